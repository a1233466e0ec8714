"""What each CUDA kernel moves: bytes of every tensor, sectors of global memory, banks of shared."""

from collections import defaultdict
from collections.abc import Iterable

import pytest
import torch
from cuda_emulator.build import broken, build
from cuda_emulator.emulator import (
    COPIED,
    MATRIX_READ,
    READ,
    SHARED_READ,
    SHARED_WRITTEN,
    Emulator,
    Point,
)
from torch import Tensor

DTYPES = [torch.bfloat16, torch.float32]
SIZE = 16  # of the images, 2 of them


def activations(channels: int, dtype: torch.dtype, size: int = SIZE) -> Tensor:
    values = torch.randn(2, channels, size, size).to(dtype)
    return values.contiguous(memory_format=torch.channels_last)


class Layer:
    """The operands of a convolution, all that is optional among them."""

    def __init__(self, dtype: torch.dtype, channels: int, filters: int, kernel: int, stride=1):
        size = SIZE // stride
        self.u, self.addend = activations(channels, dtype), activations(channels, dtype)
        self.y, self.g = activations(filters, dtype, size), activations(filters, dtype, size)
        self.residual = activations(filters, dtype, size)
        weight = torch.randn(filters, channels, kernel, kernel).to(dtype)
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.affine, self.sums = torch.rand(4, channels), torch.rand(2, channels)
        self.y_affine, self.y_sums = torch.rand(4, filters), torch.rand(2, filters)
        self.geometry = ((stride, stride), (kernel // 2,) * 4, (1, 1), 1, "relu")

    def calls(self) -> dict[str, tuple]:
        dy = (self.g, self.y, self.y_affine, self.y_sums)
        kernel_size = tuple(self.weight.shape[2:])
        return {
            "bn_stats": (self.u,),
            "bn_relu_forward": (self.u, self.affine, "relu"),
            "bn_relu_backward": (self.addend, self.u, self.affine, "relu", True),
            "residual_grad": (self.addend, self.g, self.u, self.affine, self.sums),
            "preact_conv_forward": (
                *(self.u, self.affine, self.weight, self.residual, *self.geometry, True),
            ),
            "preact_conv_dgrad": (
                *(*dy, self.weight, self.u, self.affine, self.addend, *self.geometry, True),
            ),
            "preact_conv_wgrad": (*dy, self.u, self.affine, kernel_size, *self.geometry),
        }

    def gradients(self) -> tuple:
        """Of preact_conv_backward: what dgrad takes."""
        return self.calls()["preact_conv_dgrad"]

    def of_sum(self) -> tuple:
        """Of residual_conv_backward."""
        dy = (self.residual, self.g, self.y, self.y_affine, self.y_sums)
        return *dy, self.weight, self.u, self.affine, *self.geometry


def count(emulator, name, arguments):
    """An operator's results, what it moved, and the grid of its first launch."""
    operator = getattr(emulator.operators, name)
    with emulator.recording(2, 163 * 1024) as launches:
        operator(*arguments)
    with emulator.counting() as counts:
        results = operator(*arguments)
    return results if isinstance(results, tuple) else (results,), counts, launches[0].grid


# --- bytes ---------------------------------------------------------------------------------------


def hold(
    counts,
    reads: dict[Tensor, float],
    vectors: Iterable[Tensor],
    results,
    scratch: tuple[float, float],
):
    """Each tensor's bytes as often as expected, within 2%; each result once; nothing else.

    Vectors are what a kernel's head leaves out; scratch are the bytes of partial results,
    read and written.
    """
    named_read = named_written = 0
    for tensor, times in reads.items():
        read, written = counts.bytes(tensor)
        expected = times * tensor.numel() * tensor.element_size()
        assert abs(read - expected) <= 0.02 * expected and written == 0, tuple(tensor.shape)
        named_read += read
    named_read += sum(counts.bytes(vector)[0] for vector in vectors)
    for result in results:
        read, written = counts.bytes(result)
        assert (read, written) == (0, result.numel() * result.element_size())
        named_written += written
    read, written = counts.all_bytes()
    assert (read - named_read, written - named_written) == scratch


def scratch_of_sums(parts: int, channels: int = 64) -> tuple[float, float]:
    """S1 and S2 of each part, once."""
    return parts * 2 * channels * 4, parts * 2 * channels * 4


def scratch_of_moments(parts: int, channels: int = 64) -> tuple[float, float]:
    """Four values of each part, once."""
    return parts * 4 * channels * 4, parts * 4 * channels * 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pointwise_kernels_touch_each_value_once(emulator, dtype):
    """Byte for byte, what their heads say."""
    layer = Layer(dtype, 64, 64, 1)
    calls = layer.calls()
    for name, scratch_of, reads, vectors in (
        ("bn_stats", scratch_of_moments, [layer.u], []),
        ("bn_relu_forward", lambda _: (0, 0), [layer.u], [layer.affine]),
        ("bn_relu_backward", scratch_of_sums, [layer.addend, layer.u], [layer.affine]),
        (
            *("residual_grad", lambda _: (0, 0)),
            *([layer.addend, layer.g, layer.u], [layer.affine, layer.sums]),
        ),
    ):
        results, counts, (parts, _, _) = count(emulator, name, calls[name])
        hold(counts, dict.fromkeys(reads, 1), vectors, results, scratch_of(parts))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions_touch_what_their_heads_say(emulator, kernel, dtype):
    """Each input once, of a 3x3 also its patches' halo; each output once; the weights once a block.

    wgrad reads its operands for each row of the kernel, in 16 bits for all three at once, and its
    partial results once.
    """
    layer = Layer(dtype, 64, 64, kernel)
    calls = layer.calls()
    # an 8x16 patch of a 16x16 image reads 9 of its rows, twice
    halo = 9 / 8 if kernel == 3 else 1

    def weights(grid):  # 1x1: resident, once for each of the blocks; 3x3: streamed, once a tile
        return grid[0] if kernel == 1 else 2 * SIZE * SIZE / 128

    results, counts, grid = count(emulator, "preact_conv_forward", calls["preact_conv_forward"])
    reads = {layer.u: halo, layer.residual: 1, layer.weight: weights(grid)}
    hold(counts, reads, [layer.affine], results, scratch_of_moments(grid[0]))

    results, counts, grid = count(emulator, "preact_conv_dgrad", calls["preact_conv_dgrad"])
    reads = {layer.g: halo, layer.y: halo, layer.u: 1, layer.addend: 1, layer.weight: weights(grid)}
    vectors = [layer.affine, layer.y_affine, layer.y_sums]
    hold(counts, reads, vectors, results, scratch_of_sums(grid[0]))

    results, counts, grid = count(emulator, "preact_conv_wgrad", calls["preact_conv_wgrad"])
    # of u, the first and the last row of the kernel read a row of each image less; 8x8 patches of a
    # 16x16 image read 9 rows and columns
    times, rows = kernel, kernel - (2 / SIZE if kernel == 3 else 0)
    if kernel == 3 and dtype != torch.float32:
        times, rows = 1, (9 / 8) ** 2
    splits = grid[0]
    scratch = splits * 4 * layer.weight.numel()
    reads = {layer.g: times, layer.y: times, layer.u: rows}
    hold(counts, reads, vectors, results, (scratch, scratch))


@pytest.mark.parametrize(
    ("channels", "kernel", "halo"),
    [
        (32, 3, 9 / 8),  # all three rows of the kernel; an 8x16 patch reads 9 rows of 16
        (128, 1, 1),  # 128 by 128 channels
    ],
)
def test_wgrad_of_one_block_across_reads_its_operands_once(emulator, channels, kernel, halo):
    """Where a block has all of dW, in 16 bits."""
    layer = Layer(torch.bfloat16, channels, channels, kernel)
    results, counts, grid = count(emulator, "preact_conv_wgrad", layer.calls()["preact_conv_wgrad"])
    assert grid[1:] == (1, 1)
    scratch = grid[0] * 4 * layer.weight.numel()
    reads = {layer.g: 1, layer.y: 1, layer.u: halo}
    vectors = [layer.affine, layer.y_affine, layer.y_sums]
    hold(counts, reads, vectors, results, (scratch, scratch))


@pytest.mark.parametrize(
    ("channels", "filters"), [(64, 16), (16, 64), (128, 32), (32, 128), (256, 64), (64, 256)]
)
def test_gradients_of_a_1x1_read_their_operands_once(emulator, channels, filters):
    """Both of them together, in 16 bits; dy once for each group of input channels."""
    layer = Layer(torch.bfloat16, channels, filters, 1)
    results, counts, (splits, groups, _) = count(
        emulator, "preact_conv_backward", layer.gradients()
    )
    assert groups == channels // 256 + 1
    reads = {layer.g: groups, layer.y: groups, layer.u: 1, layer.addend: 1, layer.weight: splits}
    vectors = [layer.affine, layer.y_affine, layer.y_sums]
    partial = splits * 4 * layer.weight.numel()
    read, written = scratch_of_sums(splits, channels)
    hold(counts, reads, vectors, results, (partial + read, partial + written))


@pytest.mark.parametrize(("channels", "filters"), [(16, 64), (32, 128), (64, 256)])
def test_residual_sums_in_a_1x1_read_their_operands_once(emulator, channels, filters):
    """Likewise of a residual sum, whose gradient is written once."""
    layer = Layer(torch.bfloat16, channels, filters, 1)
    results, counts, (splits, groups, _) = count(emulator, "residual_conv_backward", layer.of_sum())
    operands = dict.fromkeys((layer.g, layer.y, layer.residual), groups)
    vectors = [layer.affine, layer.y_affine, layer.y_sums]
    partial = splits * 4 * layer.weight.numel()
    read, written = scratch_of_sums(splits, channels)
    reads = {**operands, layer.u: 1, layer.weight: splits}
    hold(counts, reads, vectors, results, (partial + read, partial + written))


# --- sectors and banks ---------------------------------------------------------------------------


def waste(points: Iterable[Point]) -> dict[tuple[str, int, int], float]:
    """Where warps move more than they use: bytes of sectors, or passes over the banks, by how much.

    Keys are a file, the access and the bytes of a lane.
    """
    moved: dict[tuple[str, int, int], list[float]] = defaultdict(lambda: [0, 0])
    for p in points:
        if p.access < SHARED_READ:
            actual, least = 32 * p.sectors, p.used_bytes
        else:
            actual, least = p.passes, p.fewest_passes
        if actual > least:
            sums = moved[p.place.split(":")[0], p.access, p.lane_bytes]
            sums[0] += actual
            sums[1] += least
    return {key: actual / least for key, (actual, least) in moved.items()}


def waste_of(emulator, layer: Layer) -> dict[tuple[str, int, int], float]:
    points = []
    for name, arguments in layer.calls().items():
        if name != "residual_grad" or layer.g.shape == layer.u.shape:
            points += count(emulator, name, arguments)[1].points
    return waste(points)


# A piece of a float32 vector is 32 bytes, loaded by halves: the second is in L1.
VECTORS = {("bn.cuh", READ, 16): 2}
# The stage's rows are 2 * 16 bytes apart modulo the banks, for mma's layout; fewer channels than 64
# read two or more rows at once. Once a tile, from float32 sums.
NARROW = {("conv_tiles.cuh", SHARED_READ, 16): 2}
# The sums of a wide tile, once a block: of its rows of 128 channels, two meet in a bank.
WIDE = {("reduce.cuh", SHARED_WRITTEN, 4): 2}
# ldmatrix takes every other pixel of the window, eight rows in four places: twice. Half of this
# tile's pixels are beyond its image and read one place: once.
STRIDED = {("conv.cuh", MATRIX_READ, 16): 1.5}


@pytest.mark.parametrize(
    ("channels", "filters", "kernel", "known"),
    [
        (64, 64, 1, VECTORS),
        (256, 64, 1, VECTORS | WIDE),
        (64, 256, 1, VECTORS | WIDE),
        (64, 64, 3, VECTORS),
        (128, 128, 1, VECTORS | WIDE),
        (128, 128, 3, VECTORS | WIDE),
        (32, 32, 3, VECTORS | NARROW),
        (16, 16, 3, VECTORS | NARROW),
        (64, 16, 1, VECTORS | NARROW),
    ],
)
def test_fast_paths_use_whole_sectors_and_no_bank_twice(emulator, channels, filters, kernel, known):
    """Every access of a warp, in 16 bits: what is known above, and nothing else."""
    assert waste_of(emulator, Layer(torch.bfloat16, channels, filters, kernel)) == known


@pytest.mark.parametrize(("channels", "kernel"), [(256, 1), (128, 1), (128, 3)])
def test_largest_tiles_use_whole_sectors_and_no_bank_twice(emulator, channels, kernel):
    """128 pixels by 256 channels, or 256 by 128."""
    with emulator.device(2, 227 * 1024):
        layer = Layer(torch.bfloat16, channels, channels, kernel)
        assert waste_of(emulator, layer) == VECTORS | WIDE


# Results of fewer channels than 64; and, once a block, sums of 16 channels by a warp.
GRADIENTS = VECTORS | {("preact_conv_backward.cu", SHARED_READ, 16): 2}
BY_HALVES = {("reduce.cuh", SHARED_WRITTEN, 4): 2}


@pytest.mark.parametrize(
    ("channels", "filters"), [(64, 16), (16, 64), (128, 32), (32, 128), (256, 64), (64, 256)]
)
def test_gradients_of_a_1x1_use_whole_sectors(emulator, channels, filters):
    """And no bank twice where pixels are copied, transformed and multiplied."""
    layer = Layer(torch.bfloat16, channels, filters, 1)
    known = GRADIENTS | (BY_HALVES if filters > 64 else {})
    _, counts, _ = count(emulator, "preact_conv_backward", layer.gradients())
    assert waste(counts.points) == known
    _, counts, _ = count(emulator, "residual_conv_backward", layer.of_sum())
    assert waste(counts.points) == known


def test_stride_2_takes_the_window_in_two_passes(emulator):
    layer = Layer(torch.bfloat16, 64, 128, 3, stride=2)
    assert waste_of(emulator, layer) == VECTORS | STRIDED


@pytest.mark.parametrize("kernel", [1, 3])
def test_float32_moves_at_most_twice(emulator, kernel):
    """Its pieces are 32 bytes, moved by halves, as are wgrad's rows through the banks."""
    found = waste_of(emulator, Layer(torch.float32, 64, 64, kernel))
    assert found and max(found.values()) <= 2


def test_contiguous_weights_of_a_1x1_are_copied_as_vectors(emulator):
    """Whatever torch says about strides of dimensions of size 1."""
    layer = Layer(torch.bfloat16, 64, 64, 1)
    assert layer.weight.stride()[2:] == (1, 1)
    _, counts, _ = count(emulator, "preact_conv_forward", layer.calls()["preact_conv_forward"])
    assert {p.lane_bytes for p in counts.points if p.access in (READ, COPIED)} == {4, 16}


# --- what it finds -------------------------------------------------------------------------------


def test_uncoalesced_and_repeated_reads_are_found(emulator, tmp_path):
    """bn_relu_forward that reads u a second time, channel by channel."""
    before = "    load_piece(u + offset, me.valid, p.channels.vectors, v);\n"
    after = before + before.replace("p.channels.vectors", "false")
    cuda = broken(tmp_path, "bn_relu_forward.cu", before, after)
    library = build(tmp_path / "build", "preact_reads", cuda=cuda, reuse=emulator.library.parent)
    layer = Layer(torch.bfloat16, 64, 64, 1)
    arguments = layer.calls()["bn_relu_forward"]
    results, counts, _ = count(Emulator(library, "preact_reads"), "bn_relu_forward", arguments)
    assert waste(counts.points) == VECTORS | {("bn_relu_forward.cu", READ, 2): 8}
    hold(counts, {layer.u: 2}, [layer.affine], results, (0, 0))
    with pytest.raises(AssertionError):
        hold(counts, {layer.u: 1}, [layer.affine], results, (0, 0))


def test_bank_conflicts_are_found(emulator, tmp_path):
    """preact_conv_forward whose shared rows lie 64 bytes apart: all that touches them."""
    before = (
        "return columns + (transposed && sizeof(T) == 4 ? 32 : 16) / static_cast<int>(sizeof(T));"
    )
    cuda = broken(tmp_path, "preact_conv_forward.cu", before, "return columns;", "conv.cuh")
    library = build(tmp_path / "build", "preact_banks", cuda=cuda, reuse=emulator.library.parent)
    arguments = Layer(torch.bfloat16, 64, 64, 1).calls()["preact_conv_forward"]
    _, counts, _ = count(Emulator(library, "preact_banks"), "preact_conv_forward", arguments)
    found = waste(counts.points)
    assert found["conv.cuh", MATRIX_READ, 16] > 2  # eight rows in two places
    assert found["conv.cuh", SHARED_WRITTEN, 16] == 2  # cp.async, and what is written back


def test_conflicts_of_ordinary_stores_are_found(emulator, tmp_path):
    """bn_stats whose block reduction writes pieces as they come: eight threads to a bank."""
    before = "(i ^ (i / 32 + i / 256) % kPiece)"
    cuda = broken(tmp_path, "bn_stats.cu", before, "i", "reduce.cuh")
    library = build(tmp_path / "build", "preact_stores", cuda=cuda, reuse=emulator.library.parent)
    layer = Layer(torch.bfloat16, 64, 64, 1)
    _, counts, _ = count(Emulator(library, "preact_stores"), "bn_stats", (layer.u,))
    assert waste(counts.points) == {("reduce.cuh", SHARED_WRITTEN, 4): 8}
