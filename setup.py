"""Builds the extension module fused_preact._C; the rest of the package is in pyproject.toml."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
sys.path.insert(0, str(ROOT / "build_backend"))
from find_torch import MIN_TORCH, find_torch, refuse_old  # noqa: E402

# Nobody reads floating-point exceptions, and without them loops with a condition vectorise where
# the processor has no masks, too.
FLAGS = ["-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fopenmp-simd", "-fno-trapping-math"]
FLAGS += ["-fvisibility=hidden"]
FLAGS += shlex.split(os.environ.get("CXXFLAGS", ""))
# How new a part of torch's stable ABI the sources may use: major, minor, then zeros.
TARGET_VERSION = "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*MIN_TORCH)

# What is built where nvcc is found and TORCH_CUDA_ARCH_LIST says nothing: of these, those it knows.
CUDA_ARCHITECTURES = ["8.0", "9.0a", "10.0"]
CUDA_FLAGS = ["-std=c++20", "-O3", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden"]

NINJA_RULES = """
rule compile
  command = {cxx} {flags} -Wall -Wextra -I{csrc} $includes -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc

rule compile_cuda
  command = {nvcc} $flags -I{csrc} -MMD -MF $out.d -c $in -o $out
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
        cuda = find_cuda()
        if isinstance(cuda, str):
            print(f"fused_preact: CUDA {cuda}")
        (folder / "build.ninja").write_text(ninja_file(ext.sources, torch.root, library, cuda))
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        command = [sys.executable, "-m", "ninja", "-C", str(folder), *jobs]
        if subprocess.run(command).returncode:
            raise SystemExit("fused_preact: compilation failed, see the compiler's message above")


class Cuda(NamedTuple):
    nvcc: str
    version: str
    architectures: list[str]  # as "9.0a", or "10.0+PTX"
    libraries: Path  # the folder of libcudart_static.a

    def __str__(self) -> str:
        return f"built: nvcc {self.version} for {', '.join(self.architectures)}"

    @property
    def has_sm90(self) -> bool:
        """Whether the kernels of csrc/cuda/sm90 are built: they run on 9.0 alone."""
        return "9.0a" in [a.removesuffix("+PTX") for a in self.architectures]

    @property
    def defines(self) -> list[str]:
        return ["-DPREACT_CUDA", *(["-DPREACT_SM90"] if self.has_sm90 else [])]

    @property
    def flags_sm90(self) -> list[str]:
        return [*CUDA_FLAGS, "-gencode=arch=compute_90a,code=sm_90a"]

    @property
    def flags(self) -> list[str]:
        """Translating takes as long as assembling, so what is alike is translated once.

        Up to 9.0 that is all: it gets the same machine code from the oldest's translation.
        """
        names = [a.removesuffix("+PTX").replace(".", "") for a in self.architectures]
        numbers = [int(name.rstrip("af")) for name in names]
        codes: dict[str, list[str]] = {}  # by what they are translated for
        for name, number, architecture in zip(names, numbers, self.architectures, strict=True):
            translated = f"compute_{number if number > 90 else min(numbers)}"
            of_translation = codes.setdefault(translated, [])
            of_translation.append(f"sm_{name}")
            if architecture.endswith("+PTX"):
                of_translation.append(translated)
        flags = [f"-gencode=arch={arch},code=[{','.join(code)}]" for arch, code in codes.items()]
        return [*CUDA_FLAGS, *self.defines, *flags]


def find_cuda() -> Cuda | str:
    """nvcc and what it builds for, or why the CUDA kernels are not built."""
    if os.environ.get("FUSED_PREACT_CUDA") == "0":
        return "not built: FUSED_PREACT_CUDA=0"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)
    if nvcc is None:
        return "not built: no nvcc"

    def ask(*arguments: str) -> str:
        command = [nvcc, *arguments]
        result = subprocess.run(command, capture_output=True, text=True)
        return result.stdout + result.stderr

    folders = re.findall(r'-L([^"]+)"', ask("-dryrun", "-x", "cu", os.devnull))
    libraries = [f for f in map(Path, folders) if (f / "libcudart_static.a").exists()]
    version = re.search(r"release (\d+\.\d+)", ask("--version"))
    known = ask("--list-gpu-code").split()
    if not libraries or version is None or "sm_80" not in known:
        return f"not built: {nvcc} is no whole CUDA toolkit, or too old"
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not architectures:
        architectures = [a for a in CUDA_ARCHITECTURES if "sm_" + re.sub(r"\D", "", a) in known]
        architectures[-1] += "+PTX"
    for architecture in architectures:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", architecture):
            raise SystemExit(
                "fused_preact: TORCH_CUDA_ARCH_LIST: expected numbers such as '8.0;9.0a+PTX', "
                f"got {architecture!r}"
            )
    return Cuda(nvcc, version[1], architectures, libraries[0])


def ninja_file(sources: list[str], torch: Path, library: Path, cuda: Cuda | str) -> str:
    """build.ninja: an object for each source, one library of them all."""
    darwin = sys.platform == "darwin"
    # Named without a run-time path: fused_preact imports torch, which loads them, beforehand.
    libraries = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu"]
    nvcc = "nvcc"
    if isinstance(cuda, Cuda):
        nvcc = quote(cuda.nvcc)
        longest, *others = sources  # to compile, of all
        of_sm90 = listed("sources_sm90.txt") if cuda.has_sm90 else []
        sources = [longest, *listed("sources_cuda.txt"), *of_sm90, *others]
        # The runtime is our own, so that no other version of it is needed or disturbed.
        libraries += [f"-L{cuda.libraries}", "-Wl,--exclude-libs,libcudart_static.a"]
        libraries += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    rules = NINJA_RULES.format(
        cxx=compiler(),
        flags=quote(*FLAGS),
        csrc=quote(CSRC),
        shared="-bundle -undefined dynamic_lookup" if darwin else "-shared -Wl,--no-as-needed",
        libraries=quote(*libraries),
        nvcc=nvcc,
    )
    lines, objects = [rules], []
    for source in sources:
        objects.append(source.replace("/", "_") + ".o")
        rule = "compile_cuda" if source.endswith(".cu") else "compile"
        lines += [f"build {objects[-1]}: {rule} {ninja_path(ROOT / source)}"]
        if isinstance(cuda, Cuda) and rule == "compile_cuda":
            flags = cuda.flags_sm90 if "/sm90/" in source else cuda.flags
            lines += [f"  flags = {quote(*flags)}"]
        else:
            lines += [f"  includes = {includes(source, torch, cuda)}"]
    lines += [f"build {ninja_path(library)}: link {' '.join(objects)}"]
    return "\n".join(lines) + "\n"


def includes(source: str, torch: Path, cuda: Cuda | str) -> str:
    """Kernels see no header of torch's, and only python.cpp sees Python's."""
    if not source.startswith("csrc/torch/"):
        return ""
    arguments = [TARGET_VERSION, *(cuda.defines if isinstance(cuda, Cuda) else [])]
    folders = [torch / "include"]
    if source.endswith("/python.cpp"):
        import pybind11

        arguments += [f'-DPREACT_FLAGS="{" ".join(FLAGS)}"', f'-DPREACT_CUDA_BUILD="{cuda}"']
        folders = [pybind11.get_include(), sysconfig.get_paths()["include"], *folders]
    return quote(*arguments, *(part for folder in folders for part in ("-isystem", folder)))


def listed(name: str) -> list[str]:
    """The sources in a list that CMakeLists.txt reads as well: what takes longest begins first."""
    return [f"csrc/{line}" for line in (CSRC / name).read_text().split()]


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
            sources=listed("sources.txt"),
            depends=sorted(
                str(path.relative_to(ROOT))
                for pattern in ("*.h", "*.cuh", "*.cu")
                for path in CSRC.rglob(pattern)
            ),
        )
    ],
    cmdclass={"build_ext": NinjaBuildExt},
)
