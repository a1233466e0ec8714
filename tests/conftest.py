"""What every test runs under: a seed, two threads, and memory poisoned with NaN."""

import hypothesis
import pytest
import torch

import fused_preact
from fused_preact import _C

# Few and always the same examples; `--hypothesis-profile=thorough` looks further.
_common = {
    "deadline": None,
    "suppress_health_check": [hypothesis.HealthCheck.function_scoped_fixture],
}
hypothesis.settings.register_profile("ci", derandomize=True, max_examples=12, **_common)
hypothesis.settings.register_profile("thorough", max_examples=500, **_common)
hypothesis.settings.load_profile("ci")

BACKENDS = ("reference", *(f"cpu-{tiles}" for tiles in _C.tile_providers()))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill what is allocated and not yet written with NaN, also where the C++ library allocates:

    its outputs come from aten::empty like everybody's.
    """
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=BACKENDS)
def backend_name(request):
    """Runs the test on each backend, and "cpu" on each of its matrix-tile providers.

    Yields the backend's name.
    """
    name, _, tiles = request.param.partition("-")
    if tiles:
        _C.use_tile_provider(tiles)
    with fused_preact.backend(name):
        yield name
    if tiles:
        _C.use_tile_provider(_C.tile_providers()[0])
