"""What every test runs under: a seed, two threads, and memory poisoned with NaN."""

import os
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads leave busy cores alone

import hypothesis
import pytest
import torch
from filelock import FileLock

import fused_preact
from fused_preact import _C, ops

# Python started by a test takes the package from where this one did, not from the folder it is in.
os.environ["PYTHONSAFEPATH"] = "1"

# Few and always the same examples; `--hypothesis-profile=thorough` looks further.
_common = {
    "deadline": None,
    "suppress_health_check": [hypothesis.HealthCheck.function_scoped_fixture],
}
hypothesis.settings.register_profile("ci", derandomize=True, max_examples=12, **_common)
hypothesis.settings.register_profile("thorough", max_examples=500, **_common)
hypothesis.settings.load_profile("ci")

BACKENDS = ("reference", *(f"cpu-{tiles}" for tiles in _C.tile_providers()))
OPERATORS = _C.tile_providers()
if os.environ.get("TRITON_INTERPRET") == "1":  # a run for the Triton kernels alone
    BACKENDS = OPERATORS = ("triton",)


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
    """What is allocated and not yet written holds NaN; aten::empty fills it, for C++ as well."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=BACKENDS)
def backend_name(request):
    """The test runs on each backend, on "cpu" with each provider of its matrix tiles."""
    name, _, tiles = request.param.partition("-")
    _skip_float64(name, request)
    with fused_preact.backend(name), _tiles_by(tiles):
        yield name


@pytest.fixture(params=OPERATORS)
def operators(request):
    """The registered operators, with each provider of the CPU's matrix tiles."""
    _skip_float64(request.param, request)
    if request.param == "triton":
        with fused_preact.backend("triton"):
            yield ops.plan(torch.empty(1, 1, 1, 1))
        return
    with _tiles_by(request.param):
        yield torch.ops.fused_preact


def _skip_float64(backend, request):
    if backend == "triton" and request.node.callspec.params.get("dtype") == torch.float64:
        pytest.skip("the Triton kernels have no float64")


@pytest.fixture
def compiled():
    """torch.compile that refuses graph breaks, with no other test's graphs to count against it."""
    torch._dynamo.reset()
    return lambda function: torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.fixture
def called(monkeypatch):
    """The names of the operators called so far."""
    plan, names = ops.plan, []
    monkeypatch.setattr(ops, "plan", lambda *args: _Recording(plan(*args), names))
    return names


class _Recording:
    """A namespace of operators that writes down which are called."""

    def __init__(self, operators, names):
        self.operators, self.names = operators, names

    def __getattr__(self, name):
        def call(*args):
            self.names.append(name)
            return getattr(self.operators, name)(*args)

        return call


@contextmanager
def _tiles_by(provider):
    if provider:
        _C.use_tile_provider(provider)
    yield
    if provider:
        _C.use_tile_provider(_C.tile_providers()[0])


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    """The CUDA kernels of csrc/cuda, run without a GPU as torch.ops.fused_preact_emulator."""
    from cuda_emulator.build import build
    from cuda_emulator.emulator import Emulator

    given, name = os.environ.get("PREACT_EMULATOR"), "fused_preact_emulator"
    if given:
        return Emulator(Path(given), name)
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # the first process that wants it builds it for all
    with FileLock(shared / "emulator.lock"):
        library = shared / "emulator" / f"{name}.so"
        if not library.exists():
            build(library.parent, name)
    return Emulator(library, name)
