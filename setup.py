"""Builds the extension module fused_preact._C; the rest of the package is in pyproject.toml."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
sys.path.insert(0, str(ROOT / "build_backend"))
from find_torch import MIN_TORCH, find_torch, refuse_old  # noqa: E402

FLAGS = ["-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fopenmp-simd", "-fvisibility=hidden"]
FLAGS += shlex.split(os.environ.get("CXXFLAGS", ""))
# How new a part of torch's stable ABI the sources may use: major, minor, then zeros.
TARGET_VERSION = "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*MIN_TORCH)

NINJA_RULES = """
rule compile
  command = {cxx} {flags} -Wall -Wextra -I{csrc} $includes -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc

rule link
  command = {cxx} {flags} {shared} $in {libraries} -o $out
"""


class NinjaBuildExt(build_ext):
    """Compiles with ninja: only what changed, MAX_JOBS files at a time."""

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        refuse_old(torch)
        if torch is None:
            raise SystemExit("fused_preact: no torch to build against: pip install torch")
        for tool in ("ninja", "pybind11"):
            if not importlib.util.find_spec(tool):
                raise SystemExit(f"fused_preact: no {tool} to build with: pip install {tool}")
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(ext.sources, torch.root, library))
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        command = [sys.executable, "-m", "ninja", "-C", str(folder), *jobs]
        if subprocess.run(command).returncode:
            raise SystemExit("fused_preact: compilation failed, see the compiler's message above")


def ninja_file(sources: list[str], torch: Path, library: Path) -> str:
    """build.ninja: an object for each source, one library of them all."""
    darwin = sys.platform == "darwin"
    rules = NINJA_RULES.format(
        cxx=compiler(),
        flags=quote(*FLAGS),
        csrc=quote(CSRC),
        shared="-bundle -undefined dynamic_lookup" if darwin else "-shared -Wl,--no-as-needed",
        # Named without a run-time path: fused_preact imports torch, which loads them, beforehand.
        libraries=quote(f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu"),
    )
    lines, objects = [rules], []
    for source in sources:
        objects.append(source.replace("/", "_") + ".o")
        lines += [f"build {objects[-1]}: compile {ninja_path(ROOT / source)}"]
        lines += [f"  includes = {includes(source, torch)}"]
    lines += [f"build {ninja_path(library)}: link {' '.join(objects)}"]
    return "\n".join(lines) + "\n"


def includes(source: str, torch: Path) -> str:
    """Kernels see no header of torch's, and only python.cpp sees Python's."""
    if not source.startswith("csrc/torch/"):
        return ""
    arguments = [TARGET_VERSION]
    folders = [torch / "include"]
    if source.endswith("/python.cpp"):
        import pybind11

        arguments += [f'-DPREACT_FLAGS="{" ".join(FLAGS)}"']
        folders = [pybind11.get_include(), sysconfig.get_paths()["include"], *folders]
    return quote(*arguments, *(part for folder in folders for part in ("-isystem", folder)))


def compiler() -> str:
    command = os.environ.get("CXX", "c++")
    if not shutil.which(shlex.split(command)[0]):
        raise SystemExit(
            f"fused_preact: no C++ compiler: {command} not found. Install one or set CXX"
        )
    return command.replace("$", "$$")


def quote(*arguments) -> str:
    """Arguments for the shell, inside a value of a ninja file."""
    return shlex.join(map(str, arguments)).replace("$", "$$")


def ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    ext_modules=[
        Extension(
            "fused_preact._C",
            # CMakeLists.txt reads the same list.
            sources=[f"csrc/{line}" for line in (CSRC / "sources.txt").read_text().split()],
            depends=sorted(str(path.relative_to(ROOT)) for path in CSRC.rglob("*.h")),
        )
    ],
    cmdclass={"build_ext": NinjaBuildExt},
)
