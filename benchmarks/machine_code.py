"""The CUDA kernels as nvcc compiles them: registers, spills, and what their loops are made of."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
KERNELS = (CSRC / "sources_cuda.txt").read_text().split()
KERNELS_SM90 = (CSRC / "sources_sm90.txt").read_text().split()  # for 9.0a alone
ARCHITECTURES = {"80": "80", "90a": "80", "100": "100"}  # each: what setup.py translates it for
FLAGS = ["-std=c++20", "-O3", "-DNDEBUG", "-Werror=all-warnings", "-Xptxas=-v", "-cubin"]


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # "LDG.E.128.CONSTANT"
    target: int | None  # of a branch

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def bits(self) -> int:
        """That a thread moves, of an instruction that moves something."""
        for part in self.opcode.split(".")[1:]:
            if part in ("U8", "S8", "U16", "S16", "64", "128"):
                return int(part.lstrip("US"))
        return 128 if self.name == "LDSM" else 32

    @property
    def multiplications(self) -> int:
        """Of a warp by tensor cores, as many as m16n8k16: HMMA one, HGMMA.64x128x16.F32 16.

        What waits for products is an HGMMA too, of float16.
        """
        if self.name == "HGMMA" and ".F32" in self.opcode:
            return int(self.opcode.split("x")[1]) // 8
        return int(self.name == "HMMA")


@dataclass
class Loop:
    instructions: list[Instruction]

    def count(self, name: str, bits: int | None = None) -> int:
        return sum(i.name == name and bits in (None, i.bits) for i in self.instructions)

    @property
    def multiplications(self) -> int:
        """Of a warp."""
        return sum(i.multiplications for i in self.instructions)

    def fast_path(self) -> list[Instruction]:
        """Without the branches for memory that is no whole vectors, and for another activation."""
        return self._path_without(_is_narrow, _is_exponential) or (
            self._path_without(_is_narrow) or self.instructions
        )

    def longest_way(self) -> list[Instruction]:
        """Of the ways through the fast path, the one with most instructions."""
        return self._way_without(_is_narrow, _is_exponential) or (
            self._way_without(_is_narrow) or self.instructions
        )

    def _way_without(self, *avoided: Callable[[Instruction], bool]) -> list[Instruction]:
        blocks, following = self._blocks(*avoided)
        ways: dict[int, list[Instruction]] = {}  # from each block to the last
        for n in sorted(following, reverse=True):
            rests = [ways[m] for m in following[n] if m in ways]
            if rests or n == len(blocks) - 1:
                ways[n] = blocks[n] + max(rests, key=len, default=[])
        return ways.get(0, [])

    def _path_without(self, *avoided: Callable[[Instruction], bool]) -> list[Instruction]:
        """The blocks on ways through the loop that meet no avoided instruction; [] if none does."""
        blocks, following = self._blocks(*avoided)
        reached, stack = set(), [0] if 0 in following else []
        while stack:
            n = stack.pop()
            if n not in reached:
                reached.add(n)
                stack += following[n]
        last = self.instructions[-1].address
        useful = set()
        for n in sorted(reached, reverse=True):
            if blocks[n][-1].address == last or any(m in useful for m in following[n]):
                useful.add(n)
        return [i for n in sorted(useful) for i in blocks[n]]

    def _blocks(
        self, *avoided: Callable[[Instruction], bool]
    ) -> tuple[list[list[Instruction]], dict[int, list[int]]]:
        """Straight pieces of code, and which may follow on each that has nothing avoided."""
        first = self.instructions[0].address
        leaders = {first} | {i.target for i in self.instructions if i.target is not None}
        blocks: list[list[Instruction]] = []
        for before, i in zip([None, *self.instructions], self.instructions, strict=False):
            if before is None or i.address in leaders or before.target is not None:
                blocks.append([])
            blocks[-1].append(i)
        starts = {block[0].address: n for n, block in enumerate(blocks)}
        closed = [any(avoid(i) for i in block for avoid in avoided) for block in blocks]

        following: dict[int, list[int]] = {}
        for n, block in enumerate(blocks):
            if closed[n]:
                continue
            end = block[-1]
            to = [starts[end.target]] if end.target in starts else []
            if end.opcode != "BRA!" and n + 1 < len(blocks):
                to.append(n + 1)
            following[n] = [m for m in to if m > n and not closed[m]]
        return blocks, following


def _is_narrow(i: Instruction) -> bool:
    return i.name in ("LDG", "STG") and i.bits < 64


def _is_exponential(i: Instruction) -> bool:
    """SiLU's."""
    return i.opcode.startswith("MUFU.EX2")


@dataclass
class Kernel:
    """A kernel for one architecture."""

    name: str  # "preact_conv_forward_kernel<preact::cuda::bf16, (preact::Activation)0>"
    file: str
    registers: int
    shared_bytes: int  # static
    stack_bytes: int
    spill_bytes: int
    instructions: list[Instruction] = field(default_factory=list)

    @cached_property
    def loops(self) -> list[Loop]:
        """The innermost ones."""
        spans = [
            (i.target, i.address)
            for i in self.instructions
            if i.target is not None and i.target < i.address
        ]
        inner = [
            s
            for s in set(spans)
            if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)
        ]
        return [
            Loop([i for i in self.instructions if begin <= i.address <= end])
            for begin, end in sorted(inner)
        ]

    def per_unit(self, name: str, bits: int, beside: str | None = None) -> float:
        """Instructions that the loops with `name` issue for each; a LookupError if none has it.

        beside: another instruction that such a loop must have as well. Where activations have loops
        of their own, it is ReLU's that count.
        """
        found = [x for x in self.loops if x.count(name, bits) and (not beside or x.count(beside))]
        plain = [x for x in found if not any(map(_is_exponential, x.instructions))]
        return self._per_unit(name, bits, plain or found)

    def per_copy(self, *, weights: bool) -> float:
        """Likewise for each asynchronous copy of weights, or of windows, in 16 bits.

        Where a window's pixels lie is looked up, by 64 bits.
        """
        loops = [x for x in self.loops if x.count("LDGSTS", 128)]
        if self.copies_weights:
            loops = [x for x in loops if (x.count("LDS", 64) == 0) == weights]
        elif weights:
            loops = []
        return self._per_unit("LDGSTS", 128, loops)

    @property
    def by_warpgroups(self) -> bool:
        """Whether warpgroups multiply, and warps have roles."""
        return "_by_warpgroups" in self.name

    @property
    def copies_weights(self) -> bool:
        """Whether weights have loops of their own: not in the kernels with weight gradients."""
        return not self.name.startswith(("preact_conv_wgrad", "preact_conv_backward", "wgrad_by"))

    @cached_property
    def pieces_stored(self) -> tuple[float, float]:
        """Instructions for each piece that a convolution stores, and pieces of a turn.

        What is stored without BatchNorm, or with frozen statistics, has ways of its own.
        """
        loops = [x for x in self.loops if x.count("STG", 128)]
        plain = [x for x in loops if not any(map(_is_exponential, x.instructions))]
        ways = [loop.longest_way() for loop in plain or loops]
        return self._per_turn("STG", ways)

    @cached_property
    def pieces_filled(self) -> tuple[float, float]:
        """Likewise for those of a window that warps transform on their way from global memory.

        Without what finds out where pixels are, outside of the loop, once for several turns.
        """
        loops = [x for x in self.loops if x.count("LDG", 128) and x.count("STS", 128)]
        return self._per_turn("STS", [x.longest_way() for x in loops if x.count("FFMA")])

    def _per_turn(self, name: str, ways: list[list[Instruction]]) -> tuple[float, float]:
        units = sum(i.name == name and i.bits == 128 for way in ways for i in way)
        if not units:
            raise LookupError(f"{self.name}: found no loop for {name}.128")
        return sum(map(len, ways)) / units, units / len(ways)

    def _per_unit(self, name: str, bits: int, loops: list[Loop]) -> float:
        paths = [loop.fast_path() for loop in loops]
        units = sum(i.name == name and i.bits == bits for path in paths for i in path)
        if not units:
            raise LookupError(f"{self.name}: found no loop for {name}.{bits}")
        return sum(map(len, paths)) / units

    @cached_property
    def merge_instructions(self) -> float:
        """That the last block issues for each partial result it loads."""
        loops = [[i for i in x.instructions if "STRONG" in i.opcode] for x in self.loops]
        issued = sum(len(x.instructions) for x, own in zip(self.loops, loops, strict=True) if own)
        return issued / max(sum(map(len, loops)), 1)

    @cached_property
    def main_loop(self) -> Loop:
        """What multiplies, loads of operands and index arithmetic with it.

        The straight code up to the last multiplication, from where an inner loop ends or its own
        begins. The longest loop where nothing multiplies: what is done for each pixel.
        """
        multiplies = [i for i in self.instructions if i.multiplications]
        if not multiplies:
            return self._longest_loop()
        first, last = multiplies[0].address, multiplies[-1].address
        starts = [0]
        for i in self.instructions:
            if i.address < first and i.target is not None and i.target <= i.address:
                starts.append(i.address + 1)  # behind a loop
            if i.target is not None and i.target <= first <= last <= i.address:
                starts.append(i.target)  # in one
        begin = max(starts)
        return Loop([i for i in self.instructions if begin <= i.address <= last])

    def _longest_loop(self) -> Loop:
        """Of FFMA on operands in shared memory, else over pieces or numbers in global memory."""
        if any(i.name == "LDGSTS" for i in self.instructions):
            loops = [loop for loop in self.loops if loop.count("FFMA") > loop.count("LDS") > 0]
            loops = [max(loops, key=lambda loop: loop.count("FFMA"))]
        else:
            loops = [loop for loop in self.loops if loop.count("LDG", 128)]
            loops = loops or [loop for loop in self.loops if loop.count("LDG")]
        paths = [Loop(loop.fast_path()) for loop in loops]
        return max(paths, key=lambda path: len(path.instructions), default=Loop([]))


def nvcc() -> str | None:
    return shutil.which("nvcc")


def cuobjdump() -> str | None:
    """From the CUDA toolkit, or the one in Triton's wheel."""
    found = shutil.which("cuobjdump")
    try:
        import triton

        wheel = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    except (ImportError, TypeError):
        return found
    return found or (str(wheel) if wheel.exists() else None)


def known_architectures() -> list[str]:
    """Those of ARCHITECTURES that nvcc can compile for."""
    said = subprocess.run([nvcc(), "--list-gpu-code"], capture_output=True, text=True, check=True)
    return [a for a in ARCHITECTURES if f"sm_{a.rstrip('a')}" in said.stdout.split()]


def compile_cubins(
    folder: Path, files: list[str], architectures: list[str]
) -> dict[tuple[str, str], tuple[Path, str]]:
    """By architecture and file: the cubin, and what ptxas said. Raises where nvcc warns.

    Or where it says that products by wgmma wait for each other, which it does not call a warning.
    With sm_90a, its own kernels as well.
    """
    jobs = [(a, f) for f in files for a in architectures]
    jobs += [("90a", f) for f in KERNELS_SM90 if "90a" in architectures]

    def compile(job: tuple[str, str]) -> tuple[Path, str]:
        architecture, file = job
        cubin = folder / f"{Path(file).stem}.{architecture}.cubin"
        translated = "90a" if file in KERNELS_SM90 else ARCHITECTURES[architecture]
        code = f"-gencode=arch=compute_{translated},code=sm_{architecture}"
        command = [nvcc(), *FLAGS, code, str(CSRC / file), "-o", str(cubin)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        waiting = re.findall(r".*\(C75\d\d\).*", result.stderr)
        assert not waiting, waiting
        return cubin, result.stderr

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        return dict(zip(jobs, pool.map(compile, jobs), strict=True))


def read_kernels(file: str, cubin: Path, said: str) -> dict[str, Kernel]:
    """By name, from what ptxas said, with the instructions where there is a cuobjdump."""
    kernels = {}
    report = re.compile(
        r"Function properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\s+ptxas info\s*: Used (\d+) registers([^\n]*)"
    )
    for symbol, stack, stores, loads, registers, rest in report.findall(said):
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels[symbol] = Kernel(
            kernel_name(_demangled(symbol)),
            file,
            int(registers),
            int(shared[1]) if shared else 0,
            int(stack),
            int(stores) + int(loads),
        )
    if cuobjdump() is not None:
        command = [cuobjdump(), "-sass", str(cubin)]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for function in re.split(r"\n\s*Function : ", code)[1:]:
            symbol = function.split()[0]
            if symbol in kernels:
                kernels[symbol].instructions = _instructions(function)
    return {kernel.name: kernel for kernel in kernels.values()}


def kernel_name(demangled: str) -> str:
    """A kernel's name and template arguments, without namespaces before and parameters behind."""
    name = demangled[demangled.rindex("::", 0, demangled.index("_kernel")) + 2 :]
    if "<" not in name.split("(")[0]:
        return name.split("(")[0].strip()
    depth = 0
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == ">" and depth == 0:
            return name[: i + 1]
    raise ValueError(f"no kernel: {demangled}")


def _demangled(symbol: str) -> str:
    return subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout


def _instructions(function: str) -> list[Instruction]:
    line = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.x]*)([^;]*);")
    found = []
    for address, predicate, opcode, operands in line.findall(function):
        target = None
        if opcode.startswith("BRA") and (at := re.search(r"0x([0-9a-f]+)\s*$", operands)):
            target = int(at[1], 16)
            always = not predicate and "P" not in operands
            opcode = "BRA!" if always else "BRA"
        found.append(Instruction(int(address, 16), opcode, target))
    return found
