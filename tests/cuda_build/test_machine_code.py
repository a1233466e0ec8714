"""nvcc's own view of every kernel: no warnings, no spills, tensor cores at work. Needs no GPU."""

import re
import subprocess

import pytest
from machine_code import (
    CSRC,
    FLAGS,
    KERNELS,
    KERNELS_SM90,
    cuobjdump,
    known_architectures,
    nvcc,
    read_kernels,
)

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc")
needs_cuobjdump = pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump")


def test_sources_are_listed_once():
    for kernels, folder in ((KERNELS, "cuda"), (KERNELS_SM90, "cuda/sm90")):
        assert sorted(kernels) == sorted(f"{folder}/{p.name}" for p in (CSRC / folder).glob("*.cu"))


def test_no_kernel_spills(kernels):
    """ptxas -v: neither registers nor a stack frame in local memory.

    dgrad's largest tiles need more shared memory than devices of sm_80 have. Forward's small tiles
    share a multiprocessor two by two: one number, or two.
    """
    for (architecture, file), instances in kernels.items():
        no_kernels = ("cuda/device.cu", "cuda/sm90/use_warpgroups.cu")
        assert bool(instances) == (file not in no_kernels), file
        for kernel in instances:
            largest = re.match(r"preact_conv_dgrad_.*<(128, 4|256, 2),", kernel.name)
            if architecture == "80" and largest:
                continue
            most = 16 if re.match(r"preact_conv_forward_.*<128, 1, 16, 64,", kernel.name) else 0
            # half a pointer, once for the pieces of dy that are on their way
            most = 8 if "StridedRowWgrad" in kernel.name else most
            # 512 threads, half of whose registers are sums: spills in the prologue
            most = 56 if re.search("(Tall|Wide|Strided)PointWgrad", kernel.name) else most
            assert max(kernel.stack_bytes, kernel.spill_bytes) <= most, (
                f"{architecture} {kernel.name}"
            )


@needs_cuobjdump
@pytest.mark.parametrize("file", [k for k in KERNELS if "preact_conv" in k])
def test_convolutions_run_on_tensor_cores(kernels, file):
    """HMMA with operands by LDSM and sources by LDGSTS; float32 that is no TF32 on FFMA.

    LDSM cannot transpose 32-bit numbers, and wgrad's operands both are transposed.
    """
    for (architecture, name), instances in kernels.items():
        for kernel in instances if name == file else ():
            found = {i.name for i in kernel.instructions}
            if "f16" in kernel.name or "tf32" in kernel.name:  # bf16 as well
                wanted = {"HMMA", "LDSM", "LDGSTS"}
                if "tf32" in kernel.name and "wgrad" in file:
                    wanted.remove("LDSM")
                assert wanted <= found, f"sm_{architecture} {kernel.name}"
            elif "float" in kernel.name:
                assert "HMMA" not in found, f"sm_{architecture} {kernel.name}"


SM90 = [file for file in KERNELS_SM90 if "_by_" in file]
needs_sm90a = pytest.mark.skipif(
    nvcc() is None or "90a" not in known_architectures(), reason="this nvcc knows no sm_90a"
)


@needs_sm90a
@pytest.mark.parametrize("file", [file for file in SM90 if "wgrad" not in file])
def test_warpgroups_share_the_registers_of_their_launch(kernels, file):
    """Two blocks of 384 threads, one of 512, 640 or 768: with fewer they wait for ever for more."""
    registers = {"Slim": 80, "Tall": 128, "Wide": 128, "Point": 96, "Broad": 80}
    for kernel in kernels["90a", file]:
        (of_tile,) = (n for tile, n in registers.items() if f"{tile}Groups" in kernel.name)
        assert kernel.registers == of_tile, kernel.name


@needs_cuobjdump
@needs_sm90a
@pytest.mark.parametrize("file", SM90)
def test_warpgroups_multiply_by_wgmma(kernels, file):
    """And no HMMA; with roles, between barriers in shared memory, with registers shared anew."""
    roles = set() if "wgrad" in file else {"SYNCS", "USETMAXREG"}
    for kernel in kernels["90a", file]:
        found = {i.name for i in kernel.instructions}
        assert roles | {"HGMMA"} <= found and "HMMA" not in found, kernel.name


@needs_cuobjdump
def test_pieces_move_in_one_instruction(kernels):
    """16 bytes at a time: every kernel that has pieces loads and stores them whole."""
    for (architecture, _), instances in kernels.items():
        for kernel in instances:
            if "f16" not in kernel.name:
                continue
            code = f"sm_{architecture} {kernel.name}"
            moves = {(i.name, i.bits) for i in kernel.instructions}
            assert ("LDG", 128) in moves or ("LDGSTS", 128) in moves, code
            if "wgrad" not in kernel.name and "stats" not in kernel.name:
                assert ("STG", 128) in moves, code
            if "preact_conv" in kernel.name:
                assert {("LDS", 128), ("STS", 128), ("LDGSTS", 128)} <= moves, code


@needs_cuobjdump
@needs_sm90a
@pytest.mark.parametrize("file", ["cuda/preact_conv_dgrad.cu", "cuda/residual_grad.cu"])
def test_hopper_has_the_same_code_from_the_oldest_translation(kernels, file, tmp_path):
    """As setup.py has it: up to 9.0 everything is translated once, for the oldest."""
    cubin = tmp_path / "own.cubin"
    command = [nvcc(), *FLAGS, "-arch=sm_90a", str(CSRC / file), "-o", str(cubin)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    own = read_kernels(file, cubin, said)
    shipped = {kernel.name: kernel for kernel in kernels["90a", file]}
    assert own.keys() == shipped.keys()
    for name, kernel in own.items():
        assert kernel.instructions and kernel.instructions == shipped[name].instructions, name
