"""Reruns give the same bits, and so do other numbers of threads."""

import pytest
import torch
from numerics import fused, make_case, run

DTYPES = (torch.float32, torch.bfloat16)
ONE, TWO, X3, NONE, SAME = (1, 1), (2, 2), (3, 3), (0, 0, 0, 0), (1, 1, 1, 1)

CASES = {  # input shape, convolutions: enough of each dimension to be split among threads
    "many images": ((40, 16, 8, 8), [(16, X3, ONE, SAME), (16, X3, ONE, SAME)]),
    "many rows": ((2, 64, 56, 56), [(16, ONE, ONE, NONE), (16, X3, TWO, SAME)]),
    "many channels": ((3, 200, 5, 7), [(65, X3, ONE, SAME), (200, ONE, ONE, NONE)]),
    "wide": ((5, 300, 5, 7), [(440, ONE, ONE, NONE), (66, X3, TWO, SAME)]),  # one dW for all
    "large": ((3, 256, 5, 6), [(258, X3, ONE, SAME)]),  # dW split by products and filters
    "bn_relu": ((7, 65, 33, 9), []),
}


def _results(name, dtype, activation="relu"):
    return run(make_case(dtype, *CASES[name], activation=activation), dtype, fused)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_reruns(name, dtype, backend_name):
    """All results of five runs have the same bits: no atomics, sums merge in a fixed order."""
    first = _results(name, dtype)
    for _ in range(4):
        for key, value in _results(name, dtype).items():
            assert torch.equal(value, first[key]), key


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_threads(name, dtype, backend_name):
    """All results have the same bits with one, two, three and seven threads.

    Of the kernels' own arithmetic; reference's sums are split by PyTorch as it likes.
    """
    if backend_name != "cpu":
        pytest.skip("PyTorch's own sums depend on its threads")
    results = {}
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results[threads] = _results(name, dtype)
    for threads in (2, 3, 7):
        for key, value in results[threads].items():
            assert torch.equal(value, results[1][key]), f"{key} with {threads} threads"
