"""A run that was killed or stopped goes on to the numbers of one that was not."""

import operator
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves
from training.runs import SMALL, metrics, run_training

from fused_preact.training import checkpoint

RUN = Path("runs/digits-preact_resnet8-0001")
ARGUMENTS = (*SMALL, "--epochs", "2", "--save-seconds", "0")


class Killed(BaseException):
    """Stands in for the end of the process, which no handler sees."""


def assert_same_run(run: Path, other: Path) -> None:
    """Every number but the times: metrics, weights, momentum, random states; bit by bit."""
    assert metrics(run) == metrics(other)
    states = [checkpoint.load(path / "checkpoint.pt", torch.device("cpu")) for path in (run, other)]
    for state in states:
        state.pop("history")  # it holds times; the metrics are the same lines without
    leaves, others = (tree_leaves(state) for state in states)
    assert len(leaves) == len(others)
    for leaf, its_other in zip(leaves, others, strict=True):
        same = torch.equal if isinstance(leaf, torch.Tensor) else operator.eq
        assert same(leaf, its_other)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    torch.set_num_threads(2)  # as in each test
    parent = tmp_path_factory.mktemp("uninterrupted")
    assert run_training(*ARGUMENTS, "--out", parent) == 0
    return parent / RUN.name


def test_killed_run_resumes_to_the_same_numbers(start, train, uninterrupted):
    """SIGKILL at a random moment, twice; what goes on is bit-identical."""
    path = RUN / "checkpoint.pt"
    for argv in (ARGUMENTS, ("--resume", RUN)):
        before = path.stat().st_mtime_ns if path.exists() else 0
        process = start(*argv)
        while process.poll() is None and not (path.exists() and path.stat().st_mtime_ns > before):
            time.sleep(0.01)
        assert process.poll() is None, process.stderr.read()
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        process.wait()
    assert train("--resume", RUN)[0] == 0
    assert_same_run(RUN, uninterrupted)


def test_killed_at_any_write_resumes_to_the_same_numbers(train, monkeypatch, uninterrupted):
    """Ended just before or just after a file takes its name, at about every other file."""
    replace = os.replace
    fate_of = random.Random(0)

    def deadly_replace(source, target):
        fate = fate_of.choice(["live", "live", "die before", "die after"])
        if Path(target).name == "config.json":  # without it there is no run yet
            fate = "live"
        if fate == "die before":
            raise Killed
        replace(source, target)
        if fate == "die after":
            raise Killed

    monkeypatch.setattr(checkpoint.os, "replace", deadly_replace)
    argv = ARGUMENTS
    kills = 0
    while True:
        try:
            assert train(*argv)[0] == 0
            break
        except Killed:
            kills += 1
            argv = ("--resume", RUN)
    assert kills > 5
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

    with monkeypatch.context() as patch:
        patch.setattr(Training, "train_step", interrupted_step)
        code, _, error = train(*ARGUMENTS, "--save-seconds", "1000")
    assert code == 130
    assert error == f"stopped; go on with: fused-preact train --resume {RUN}\n"
    assert checkpoint.load(RUN / "checkpoint.pt", torch.device("cpu"))["step"] == 7
    assert train("--resume", RUN)[0] == 0
    assert_same_run(RUN, uninterrupted)


def test_ctrl_c_of_a_process_with_workers(start):
    """A terminal sends SIGINT to the data workers as well; nobody prints a traceback."""
    process = start(*ARGUMENTS, "--epochs", "100", "--workers", "2")
    while process.poll() is None and not RUN.joinpath("checkpoint.pt").exists():
        time.sleep(0.01)
    assert process.poll() is None, process.stderr.read()
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == f"stopped; go on with: fused-preact train --resume {RUN}\n"


def test_finished_run_stays_finished(train, uninterrupted):
    """Resuming it trains no further and says again what it reached."""
    before = metrics(uninterrupted)
    code, output, _ = train("--resume", uninterrupted)
    assert code == 0 and "held-out" in output.splitlines()[-1]
    assert metrics(uninterrupted) == before
