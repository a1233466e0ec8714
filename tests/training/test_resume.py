"""A run that was killed or stopped goes on to the numbers of one that was not."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from training.runs import SMALL, metrics

from fused_preact.training import checkpoint

RUN = Path("runs/digits-preact_resnet8-0001")
ARGUMENTS = (*SMALL, "--epochs", "3", "--save-seconds", "0")


class Killed(BaseException):
    """Stands in for the end of the process, which no handler sees."""


def assert_same_run(run: Path, other: Path) -> None:
    """Every number but the times: metrics, weights, momentum, random states; bit by bit."""
    assert metrics(run) == metrics(other)
    states = [checkpoint.load(path / "checkpoint.pt", torch.device("cpu")) for path in (run, other)]
    for state in states:
        state.pop("history")  # it holds times; the metrics are the same lines without
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.fixture
def uninterrupted(train):
    """The folder of a run that nothing disturbed."""
    assert train(*ARGUMENTS, "--out", "whole")[0] == 0
    return Path("whole") / RUN.name


def test_killed_run_resumes_to_the_same_numbers(start, train, uninterrupted):
    """SIGKILL at a random moment, twice; what goes on is bit-identical."""
    for attempt in range(2):
        argv = ARGUMENTS if attempt == 0 else ("--resume", RUN)
        before = RUN.joinpath("checkpoint.pt").stat().st_mtime_ns if attempt else 0
        process = start(*argv)
        while process.poll() is None:
            path = RUN / "checkpoint.pt"
            if path.exists() and path.stat().st_mtime_ns > before:
                break
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.5))
        process.kill()
        process.wait()
    assert train("--resume", RUN)[0] == 0
    assert_same_run(RUN, uninterrupted)


def test_killed_at_any_write_resumes_to_the_same_numbers(train, monkeypatch, uninterrupted):
    """Ended just before or just after each file takes its name, again and again."""
    replace = os.replace
    ends = ["before", "after"] * 20

    def killing_replace(source, target):
        if Path(target).name == "config.json" or not ends:
            return replace(source, target)
        if killing_replace.calls % 2 == 1:  # every other write goes through
            killing_replace.calls += 1
            if ends.pop() == "after":
                replace(source, target)
            raise Killed
        killing_replace.calls += 1
        return replace(source, target)

    killing_replace.calls = 0
    monkeypatch.setattr(checkpoint.os, "replace", killing_replace)
    argv = ARGUMENTS
    kills = 0
    while True:
        try:
            assert train(*argv)[0] == 0
            break
        except Killed:
            kills += 1
            argv = ("--resume", RUN)
    assert kills > 10
    assert_same_run(RUN, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_run_saves_and_says_how_to_go_on(train, monkeypatch, uninterrupted, number):
    """The signal arrives in the middle of a step: that step is finished and saved."""
    from fused_preact.training.loop import Training

    step = Training.train_step

    def interrupted_step(training, *batch):
        if training.step == 6:
            os.kill(os.getpid(), number)
        step(training, *batch)

    monkeypatch.setattr(Training, "train_step", interrupted_step)
    code, _, error = train(*ARGUMENTS, "--save-seconds", "1000")
    assert code == 130
    assert error == f"stopped; go on with: fused-preact train --resume {RUN}\n"
    assert checkpoint.load(RUN / "checkpoint.pt", torch.device("cpu"))["step"] == 7

    monkeypatch.undo()
    monkeypatch.chdir(uninterrupted.resolve().parent.parent if False else Path.cwd())
    assert train("--resume", RUN)[0] == 0
    assert_same_run(RUN, uninterrupted)


def test_ctrl_c_of_a_process_with_workers(start):
    """SIGINT goes to the data workers as well, as a terminal sends it; nobody prints a traceback."""


def test_finished_run_stays_finished(train, uninterrupted):
    """Resuming it trains no further and says again what it reached."""
    before = metrics(uninterrupted)
    code, output, _ = train("--resume", uninterrupted)
    assert code == 0 and "held-out" in output.splitlines()[-1]
    assert metrics(uninterrupted) == before
