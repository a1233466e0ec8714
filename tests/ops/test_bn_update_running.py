"""bn_update_running: running statistics on their way to those of a batch, in place."""

import pytest
import torch

from fused_preact import reference

RUNNING = (torch.float32, torch.bfloat16, torch.float64)
CHANNELS, COUNTS, MOMENTUM = (3, 200, 1), (2, 6272, 49), (0.1, 0.9, 1.0)


def _arguments(dtype, accumulator=torch.float32):
    """Several BatchNorms; the running variances are every second number of a larger vector."""
    mean = [torch.randn(c).to(dtype) for c in CHANNELS]
    var = [torch.rand(c, 2).to(dtype)[:, 0] for c in CHANNELS]
    stats = [torch.rand(2, c).to(accumulator) for c in CHANNELS]
    return mean, var, stats, list(MOMENTUM), list(COUNTS)


def _copy(tensors, dtype):
    return [tensor.to(dtype, copy=True) for tensor in tensors]


@pytest.mark.parametrize("dtype", RUNNING)
def test_towards_the_batch(dtype, operators):
    """One rounding from float64's result, and three of the accumulator's, of the larger end."""
    mean, var, stats, *rest = _arguments(dtype)
    start = _copy(mean + var, torch.float64)
    true = _copy(mean, torch.float64), _copy(var, torch.float64)
    reference.bn_update_running(*true, _copy(stats, torch.float64), *rest)
    operators.bn_update_running(mean, var, stats, *rest)
    eps = torch.finfo(dtype).eps / 2 + 3 * torch.finfo(torch.float32).eps
    for ours, exact, before in zip(mean + var, true[0] + true[1], start, strict=True):
        largest = torch.maximum(exact.abs(), before.abs()).clamp_min(2)  # an unbiased var of 2
        assert ours.dtype == dtype
        assert ((ours.double() - exact).abs() <= eps * largest).all()


def test_all_of_the_way(operators):
    """A momentum of 1 leaves the batch's own, bit for bit."""
    mean, var, stats, _, counts = _arguments(torch.float32)
    operators.bn_update_running(mean, var, stats, [1.0] * 3, counts)
    assert all(torch.equal(ours, batch[0]) for ours, batch in zip(mean, stats, strict=True))


def test_one_batch_norm_twice(operators):
    """One after the other."""
    mean, var = torch.zeros(300), torch.ones(300)
    stats = [torch.ones(2, 300), torch.full((2, 300), 3.0)]
    operators.bn_update_running([mean] * 2, [var] * 2, stats, [0.5, 0.5], [2, 2])
    assert (mean == 1.75).all() and (var == 3.75).all()  # vars of 2 and 6


def test_more_batch_norms_than_one_launch_has_room_for(operators):
    """Forty at once."""
    mean, var = torch.zeros(40, 5), torch.zeros(40, 5)
    stats = torch.rand(40, 2, 5)
    operators.bn_update_running(list(mean), list(var), list(stats), [1.0] * 40, [2] * 40)
    assert torch.equal(mean, stats[:, 0]) and torch.equal(var, 2 * stats[:, 1])


def test_opcheck():
    """Declared mutation, fake kernel, compilation with dynamic shapes."""
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    operator = torch.ops.fused_preact.bn_update_running.default
    torch.library.opcheck(operator, _arguments(torch.float32), test_utils=tests)


def test_compiled_counts_stay_symbolic(operators):
    """Another batch size is no other graph."""
    mean, var = torch.zeros(4), torch.ones(4)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=backend, dynamic=True)
    def function(x):
        stats = torch.stack(torch.var_mean(x, 0, correction=0)[::-1])
        operators.bn_update_running([mean], [var], [stats], [1.0], [x.shape[0]])
        return x + 1

    torch._dynamo.reset()
    for rows in (5, 7, 9):
        x = torch.randn(rows, 4)
        function(x)
        torch.testing.assert_close(var, x.var(0))
    assert len(graphs) == 1


def test_checks_name_the_argument():
    """Which list is wrong, and how."""
    op = torch.ops.fused_preact.bn_update_running
    vector, stats = torch.zeros(3), torch.zeros(2, 3)
    error = (ValueError, RuntimeError)
    with pytest.raises(error, match="counts: expected more than 1 value per channel, got 1"):
        op([vector], [vector.clone()], [stats], [0.1], [1])
    with pytest.raises(error, match=r"running_var: expected shape \(3,\), got \(4,\)"):
        op([vector], [torch.zeros(4)], [stats], [0.1], [2])
