"""Compiles csrc/cuda for the emulator: one library of operators, torch.ops.<namespace>."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"

OWN = [HERE / f"{name}.cpp" for name in ("emulator", "counters", "product", "register")]
FLAGS = ["-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
SANITIZED = ["-Wno-clobbered", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# A third of the build: pointers that are wrong, which AddressSanitizer finds when they are used.
SANITIZED += ["-fno-sanitize=pointer-overflow,object-size"]


def build(
    folder: Path,
    namespace: str,
    *,
    cuda: Path = CSRC / "cuda",
    sanitize: bool = False,
    reuse: Path | None = None,
    optimise: str = "-O1",
) -> Path:
    """The library in folder, of the kernels in cuda.

    reuse is the folder of an earlier build: what cuda lacks comes from there. Below "-O1" a build
    is faster, but accesses cannot be told by their places.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, optimise] + (SANITIZED if sanitize else [])
    flags += [
        f"-I{HERE}",
        f"-I{cuda}",
        f"-I{CSRC / 'cuda'}",
        f"-I{CSRC}",
        "-DPREACT_SM90",
    ]
    torch_flags = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem"]
    torch_flags += [str(Path(torch.__file__).parent / "include")]
    flags_of = {"register.cpp": torch_flags, "product.cpp": ["-O3", "-fno-sanitize=all"]}
    # These run at every access of a kernel, whatever that is built with.
    flags_of |= {name: ["-O2"] for name in ("emulator.cpp", "counters.cpp")}
    compiler = os.environ.get("CXX", "c++").split()

    def compile(source: Path) -> Path:
        object_file = folder / f"{source.name}.o"
        command = [*compiler, *flags, *flags_of.get(source.name, [])]
        command += ["-x", "c++", "-c", str(source), "-o", str(object_file)]
        subprocess.run(command, check=True)
        return object_file

    # device.cu asks the driver what it is; there is none here.
    kernels = [source for source in cuda.rglob("*.cu") if source.name != "device.cu"]
    kernels.sort(key=lambda source: -source.stat().st_size)  # what takes longest begins first
    named = folder / "namespace.cpp"
    named.write_text(f'extern const char* const emulator_namespace = "{namespace}";\n')
    own = [named] if reuse is not None else [*OWN, named]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        objects = list(pool.map(compile, [*kernels, *own]))
    if reuse is not None:
        built = {path.name for path in objects}
        objects += [path for path in reuse.glob("*.o") if path.name not in built]
    library = folder / f"{namespace}.so"
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu"]
    command = [*compiler, *flags, "-shared", *map(str, objects), *libraries, "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def broken(folder: Path, kernel: str, before: str, after: str, file: str | None = None) -> Path:
    """A folder with a kernel, and the headers, in one file of which one thing is broken."""
    cuda = folder / "broken"
    cuda.mkdir()
    for header in CSRC.glob("*.h"):
        shutil.copy(header, folder)
    headers = [*(CSRC / "cuda").rglob("*.cuh"), *(CSRC / "cuda").rglob("*.h")]
    for source in [*headers, CSRC / "cuda" / "bn_affine.cu", CSRC / "cuda" / kernel]:
        copy = cuda / source.relative_to(CSRC / "cuda")
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(source, copy)
    target = cuda / (file or kernel)
    text = target.read_text()
    assert text.count(before) == 1, target.name
    target.write_text(text.replace(before, after))
    return cuda


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), sys.argv[2], sanitize="--sanitize" in sys.argv))
