"""fused-preact train, called in this process or started as one of its own."""

import os
import subprocess
import sys

import pytest
from training.runs import make_image_folder, run_training, torchvision_or_skip


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def train(capsys):
    """Runs fused-preact train here; returns (exit code, standard output, standard error)."""

    def call(*argv):
        return run_training(*argv), *capsys.readouterr()

    return call


@pytest.fixture
def start():
    """Starts fused-preact train as a process; it ends with the test at the latest."""
    processes = []

    def call(*argv):
        code = "import sys; from fused_preact.cli import main; sys.exit(main())"
        process = subprocess.Popen(
            [sys.executable, "-c", code, "train", *map(str, argv)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a signal to its process group must not reach the tests
            env={**os.environ, "OMP_NUM_THREADS": "2"},  # as many as the tests' own process has
        )
        processes.append(process)
        return process

    yield call
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def image_folder(tmp_path):
    """train/ and test/ of 16 x 16 images in the classes dark and light."""
    torchvision_or_skip()
    return make_image_folder(tmp_path / "images", size=16)
