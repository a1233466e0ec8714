"""The build: which torch it takes, what it leaves, and what the commands say about it."""

import re
import subprocess
import sys
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch

import fused_preact
from fused_preact import _C, cli, doctor

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def backend(monkeypatch):
    """The build backend, imported as pip imports it."""
    monkeypatch.syspath_prepend(ROOT / "build_backend")
    import backend

    return backend


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """Makes an environment to install into that holds the torch of a version, or none."""

    def make(version):
        if version:
            (tmp_path / "torch").mkdir()
            (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('not imported')")
            (tmp_path / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
        folders = {"purelib": str(tmp_path), "platlib": str(tmp_path)}
        monkeypatch.setattr(sysconfig, "get_paths", lambda: folders)
        monkeypatch.setattr("find_torch.find_spec", lambda name: None)
        return tmp_path

    return make


HOOKS = ["get_requires_for_build_wheel", "get_requires_for_build_editable"]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("version", ["2.11.0", "2.14.1+cu130", "3.0.0a0+git1234"])
def test_torch_of_the_environment_is_not_fetched_again(backend, environment, hook, version):
    environment(version)
    requires = getattr(backend, hook)()
    assert {"ninja", "pybind11"} <= set(requires)
    assert not any("torch" in line for line in requires)


@pytest.mark.parametrize("hook", HOOKS)
def test_torch_is_fetched_where_there_is_none(backend, environment, hook):
    environment(None)
    assert "torch>=2.11" in getattr(backend, hook)()


@pytest.mark.parametrize("hook", HOOKS)
def test_old_torch_is_refused_in_words(backend, environment, hook):
    folder = environment("2.10.1+cpu")
    with pytest.raises(SystemExit) as refusal:
        getattr(backend, hook)()
    assert str(refusal.value) == (
        f"fused_preact needs torch >= 2.11, but found torch 2.10.1+cpu in {folder}. "
        "Upgrade it: pip install --upgrade 'torch>=2.11'"
    )


def test_source_distribution_needs_no_torch(backend, environment):
    environment("2.10.1")
    assert backend.get_requires_for_build_sdist() == []


def test_old_torch_is_refused_at_import(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.1")
    with pytest.raises(ImportError, match=r"Found torch 2\.10\.1.*pip install --upgrade"):
        doctor.require_torch()


def test_oldest_torch_is_one_number(backend):
    from find_torch import MIN_TORCH

    minimum = ".".join(map(str, MIN_TORCH))
    assert f"torch>={minimum}" in PROJECT["dependencies"]
    assert minimum == _C.build_info()["torch_target"]
    assert MIN_TORCH == doctor.MIN_TORCH


def test_sources_are_listed_once():
    listed = (CSRC / "sources.txt").read_text().split()
    assert sorted(listed) == sorted(str(p.relative_to(CSRC)) for p in CSRC.rglob("*.cpp"))


def test_kernels_see_no_torch_header():
    """csrc/cpu and the headers compile without torch: a kernel is built and read by itself."""
    files = [*CSRC.glob("*.h"), *(CSRC / "cpu").iterdir()]
    assert not [f for f in files if re.search(r"#include <(torch|ATen|c10)/", f.read_text())]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads an ELF file with nm")
def test_library_needs_only_the_stable_abi():
    """No C++ symbol of torch's, save those that may be absent: one binary runs with any torch."""
    command = ["nm", "--dynamic", "--undefined-only", "--demangle", _C.__file__]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    needed = [line.split(maxsplit=1) for line in lines]
    assert ["U", "torch_library_impl"] in needed
    cplusplus = re.compile(r"\b(at|c10|caffe2|torch)::")
    assert [name for kind, name in needed if kind == "U" and cplusplus.search(name)] == []
    assert all(kind == "w" for kind, name in needed if "brgemm" in name)


def test_build_info():
    info = fused_preact.build_info()
    assert info["version"] == PROJECT["version"] == metadata.version("fused_preact")
    assert re.match(r"(gcc|clang) \d+", info["compiler"])
    assert info["cplusplus"] >= 202002
    assert "-O3" in info["flags"] and "-fopenmp-simd" in info["flags"]
    # Neither what changes results nor what ties the binary to one processor.
    assert "-ffast-math" not in info["flags"] and "-march" not in info["flags"]
    assert re.match(r"2\.\d+", info["torch_headers"])
    assert re.match(r"built: nvcc \d|not built: ", info["cuda"])


def test_doctor_names_each_backend_and_why_one_is_absent(capsys):
    assert cli.main(["doctor"]) == 0
    output = capsys.readouterr().out
    for text in (torch.__version__, metadata.version("fused_preact"), "gcc", "-O3",
                 torch.backends.cpu.get_cpu_capability()):  # fmt: skip
        assert text in output
    for name, reason in fused_preact.ops.backend_status().items():
        expected = "ready" if reason is None else f"absent: {reason}"
        assert re.search(rf"^ *{name} +{re.escape(expected)}$", output, re.MULTILINE)


def test_doctor_fails_where_no_kernel_can_run(monkeypatch):
    monkeypatch.setattr(fused_preact.ops, "backend_status", lambda: {"cpu": "no library"})
    assert cli.main(["doctor"]) == 1


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as refusal:
        cli.main(["trian"])
    assert refusal.value.code == 2
    assert "trian" in capsys.readouterr().err
