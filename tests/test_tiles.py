"""The two providers of the CPU's matrix tiles, and lesser processors than this one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numerics import fused, make_case, run

import fused_preact
from fused_preact import _C

TESTS = Path(__file__).parent
# a few of the operator tests; their docstrings say what they hold against what
SAMPLE = "test_options or test_against_float64 or test_mean_far_from_zero"


@pytest.fixture
def default_tiles():
    yield
    _C.use_tile_provider(_C.tile_providers()[0])


def test_portable_is_always_there():
    """The provider of our own needs nothing from torch."""
    assert "portable" in _C.tile_providers()
    assert set(_C.tile_providers()) <= {"brgemm", "portable"}


def test_unknown_provider(default_tiles):
    """An unknown name is an error, and changes nothing."""
    with pytest.raises((ValueError, RuntimeError), match="fast"):
        _C.use_tile_provider("fast")


@pytest.mark.skipif(len(_C.tile_providers()) < 2, reason="this torch offers no brgemm")
def test_provider_is_used(default_tiles):
    """Two providers add up 1,800 products in other orders: some last bits of the output differ.

    If none did, the choice would not have reached the kernels.
    """
    case = make_case(torch.float32, (1, 200, 5, 7), [(65, (3, 3), (2, 2), (1, 1, 1, 1))])
    outputs = []
    with fused_preact.backend("cpu"):
        for provider in _C.tile_providers():
            _C.use_tile_provider(provider)
            outputs.append(run(case, torch.float32, fused)["output"])
    assert not torch.equal(*outputs)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "environment",
    [
        {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
        {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    ],
    ids=lambda environment: environment["ONEDNN_MAX_CPU_ISA"],
)
@pytest.mark.parametrize("operator", ["preact_conv_forward", "preact_conv_wgrad"])
def test_lesser_processors(operator, environment):
    """The operator's tests pass where torch and oneDNN use less than this processor has."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [str(TESTS / "ops" / f"test_{operator}.py"), "-k", SAMPLE]
    result = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
