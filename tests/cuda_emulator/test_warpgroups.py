"""The kernels of csrc/cuda/sm90, without a GPU: results, who takes what, and faults that show."""

import re

import pytest
import torch
from cuda_emulator.build import broken, build
from cuda_emulator.cases import NAMES, SANITIZED, Shape, calls, results
from cuda_emulator.emulator import READ, SHARED_READ, Emulator
from cuda_emulator.test_emulator import assert_close, kernels_of
from cuda_emulator.test_memory import (
    WIDE,
    Layer,
    hold,
    scratch_of_moments,
    scratch_of_sums,
    waste,
)

from fused_preact import reference

DEVICE = (1, 227 * 1024)  # one multiprocessor, so that blocks have several tiles
PAD = (1, 1, 1, 1)
SHAPES = [
    Shape(1, 8, 6, 5, 8, (3, 3), padding=PAD),  # half a product's depth
    Shape(2, 16, 5, 7, 16, (3, 3), padding=PAD),
    Shape(1, 1024, 3, 1, 8, (1, 1)),  # more steps of weights than stay
    Shape(3, 72, 7, 7, 136, (1, 1)),  # two chunks, the second one narrower; three groups
    Shape(2, 64, 1, 1, 48, (3, 3), padding=PAD),  # images of one pixel
    Shape(1, 40, 16, 16, 24, (3, 3), padding=PAD),
    Shape(5, 48, 4, 4, 40, (3, 3), padding=PAD),  # several images a tile
    Shape(2, 64, 12, 13, 64, (3, 3), padding=PAD),  # the tall tile
    Shape(2, 128, 12, 13, 128, (3, 3), padding=PAD),  # the wide tile, weights in a ring
    Shape(3, 256, 9, 9, 256, (1, 1)),
    Shape(2, 48, 7, 5, 40, (1, 1)),
    Shape(1, 40, 7, 10, 328, (1, 1)),  # the broad tile twice, of the last one a group and a piece
    Shape(1, 328, 7, 10, 40, (1, 1)),
    Shape(1, 320, 9, 9, 320, (1, 1)),  # the wide tile three times, the last half of it
    Shape(1, 32, 3, 70, 64, (3, 3), padding=PAD),  # rows longer than a piece of a tile
    Shape(1, 16, 2, 1000, 16, (3, 3), padding=PAD),  # the tall tile, of few channels
    Shape(2, 64, 12, 13, 64, (3, 3), (2, 2), PAD),  # four phases, of 6 x 7 or fewer pixels
    Shape(2, 128, 7, 6, 136, (3, 3), (2, 2), PAD),
    Shape(2, 16, 1, 1, 48, (3, 3), (2, 2), PAD),  # three phases have no pixel
    Shape(1, 40, 4, 50, 24, (3, 3), (2, 2), PAD),
    Shape(3, 72, 7, 7, 136, (1, 1), (2, 2)),  # three phases have no tap
    Shape(2, 128, 9, 14, 128, (1, 1), (2, 2)),
]


def is_left(name: str, filters: int, channels: int, kernel: int) -> bool:
    """Whether a convolution has too few channels for these kernels."""
    if name == "preact_conv_wgrad":
        return max(filters, channels) <= 32 and kernel == 3
    return name == "preact_conv_forward" and filters <= 32


def test_shapes_meet_every_tile(emulator):
    tiles = {name: set() for name in NAMES}
    for shape in SHAPES:
        for name, arguments in calls(shape, torch.bfloat16, False).items():
            with emulator.recording(*DEVICE, warpgroups=True) as launches:
                getattr(emulator.operators, name)(*arguments)
            tile = re.search(r"warpgroups_kernel<.*?(\w+)(?:Groups|Wgrad)\b", launches[0].kernel)
            tiles[name] |= {tile[1]} if tile else set()
    of_conv = {"Slim", "Tall", "Wide", "Point", "Broad"}
    of_wgrad = {"Row", "Point", "TallPoint", "WidePoint", "StridedRow", "StridedPoint"}
    assert tiles == dict(zip(NAMES, (of_conv, of_conv, of_wgrad), strict=True))


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "bare"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_convolutions_match_reference(emulator, shape, dtype, whole):
    """Within a few roundings of the dtype, and with the same bits in any order.

    Those of few channels by the kernels that they are left to.
    """
    for name, arguments in calls(shape, dtype, whole).items():
        with emulator.recording(*DEVICE, warpgroups=True) as launches:
            getattr(emulator.operators, name)(*arguments)
        by_warpgroups = name.removeprefix("preact_conv_") + "_by_warpgroups"
        left = is_left(name, shape.filters, shape.channels, shape.kernel[0])
        expected = name if left else by_warpgroups
        assert kernels_of(launches)[0] == expected
        with emulator.device(*DEVICE, warpgroups=True):
            emulator.seed(1)
            ours = results(emulator.operators, name, arguments)
            emulator.seed(2)
            again = results(emulator.operators, name, arguments)
        assert_close(ours, results(reference, name, arguments), dtype)
        for key, value in ours.items():
            assert torch.equal(value, again[key]), key


def test_frozen_statistics_match_reference(emulator):
    """BatchNorm's backward pass with frozen statistics ends in dgrad's epilogue."""
    for shape in (SHAPES[5], SHAPES[9], SHAPES[13]):
        arguments = calls(shape, torch.bfloat16, True)["preact_conv_dgrad"]
        residual = torch.randn_like(arguments[5])
        arguments = (*arguments[:7], None, *arguments[8:])
        options = {"frozen": True, "residual": residual}
        with emulator.device(*DEVICE, warpgroups=True):
            ours = emulator.operators.preact_conv_dgrad(*arguments, **options)
        truth = reference.preact_conv_dgrad(*arguments, **options)
        names = NAMES["preact_conv_dgrad"]
        assert_close(
            *(dict(zip(names, values, strict=True)) for values in (ours, truth)), torch.bfloat16
        )


@pytest.mark.parametrize(
    ("shape", "dtype", "activation"),
    [
        (Shape(2, 16, 5, 7, 40, (3, 3), padding=PAD), torch.float32, "relu"),
        (Shape(2, 16, 5, 7, 40, (3, 3), padding=PAD), torch.bfloat16, "silu"),
        (Shape(2, 12, 5, 7, 40, (3, 3), padding=PAD), torch.bfloat16, "relu"),
        (Shape(2, 16, 5, 7, 44, (3, 3), padding=PAD), torch.bfloat16, "relu"),
        (Shape(2, 16, 6, 6, 40, (3, 3), (2, 1), PAD), torch.bfloat16, "relu"),
        (Shape(2, 16, 6, 6, 40, (3, 3), (3, 3), PAD), torch.bfloat16, "relu"),
        (Shape(2, 16, 6, 6, 40, (3, 3), (2, 2), (0, 1, 0, 1)), torch.bfloat16, "relu"),
        (Shape(2, 16, 6, 6, 40, (3, 3), padding=(0, 1, 0, 1)), torch.bfloat16, "relu"),
        (Shape(2, 16, 6, 6, 40, (2, 2), padding=(0, 1, 0, 1)), torch.bfloat16, "relu"),
        (Shape(2, 16, 6, 6, 40, (1, 3), padding=(0, 0, 1, 1)), torch.bfloat16, "relu"),
    ],
    ids=str,
)
def test_other_convolutions_take_other_kernels(emulator, shape, dtype, activation):
    for name, arguments in calls(shape, dtype, False).items():
        arguments = tuple(activation if a == "relu" else a for a in arguments)
        with emulator.recording(*DEVICE, warpgroups=True) as launches:
            getattr(emulator.operators, name)(*arguments)
        assert kernels_of(launches)[0] == name


def test_they_have_to_be_asked_for(emulator):
    """Until a GPU has run them."""
    for name, arguments in calls(SHAPES[9], torch.bfloat16, True).items():
        with emulator.recording(*DEVICE) as launches:
            getattr(emulator.operators, name)(*arguments)
        assert kernels_of(launches)[0] == name


# --- memory --------------------------------------------------------------------------------------


def counted(emulator, name: str, arguments: tuple):
    """An operator's results, what it moved, and its first launch's grid."""
    operator = getattr(emulator.operators, name)
    with emulator.recording(*DEVICE, warpgroups=True) as launches:
        operator(*arguments)
    assert "_by_warpgroups" in launches[0].kernel
    with emulator.device(*DEVICE, warpgroups=True), emulator.counting() as counts:
        found = operator(*arguments)
    return found if isinstance(found, tuple) else (found,), counts, launches[0].grid


def loaded(image: int, gap: int, tile: int, before: int, behind: int, stride: int = 1) -> float:
    """What windows of so many positions load of two images, in images.

    With so many rows, and as many positions, before and behind them; with stride 2 of each of four
    phases, half as large.
    """
    size = image // stride
    pitch = size + gap
    line = 2 * pitch * pitch
    before, behind = (rows * (pitch + 1) for rows in (before, behind))
    pixels = 0
    for first in range(0, line, tile):
        for p in range(max(first - before, 0), min(first + tile + behind, line)):
            pixels += p % pitch < size and p // pitch % pitch < size
    return stride**2 * pixels / (2 * image * image)


@pytest.mark.parametrize(
    ("channels", "kernel", "stride"), [(64, 1, 1), (256, 1, 1), (64, 3, 1), (64, 3, 2)]
)
def test_convolutions_touch_what_their_heads_say(emulator, channels, kernel, stride):
    """Each input once, of a 3x3 the halo of its tiles twice; each output once; resident weights.

    With stride 2 dgrad reads dy for each phase.
    """
    layer = Layer(torch.bfloat16, channels, 64, kernel, stride)
    calls, gap = layer.calls(), kernel // 2
    image, behind = layer.u.shape[-1], gap if stride == 1 else 0
    tile = 256 if gap else 128

    results, counts, grid = counted(emulator, "preact_conv_forward", calls["preact_conv_forward"])
    of_u = loaded(image, gap, tile, gap, behind, stride)
    reads = {layer.u: of_u, layer.residual: 1, layer.weight: grid[0]}
    hold(counts, reads, [layer.affine], results, scratch_of_moments(grid[0]))

    results, counts, grid = counted(emulator, "preact_conv_dgrad", calls["preact_conv_dgrad"])
    of_dy = stride**2 * loaded(image // stride, gap, tile, behind, gap)
    both = dict.fromkeys((layer.g, layer.y), of_dy)
    reads = {**both, layer.u: 1, layer.addend: 1, layer.weight: grid[0]}
    vectors = [layer.affine, layer.y_affine, layer.y_sums]
    hold(counts, reads, vectors, results, scratch_of_sums(grid[0], channels))

    results, counts, grid = counted(emulator, "preact_conv_wgrad", calls["preact_conv_wgrad"])
    of_u = loaded(image, gap, tile // stride, gap, behind, stride)
    reads = {layer.g: 1, layer.y: 1, layer.u: of_u}
    scratch = grid[0] * 4 * layer.weight.numel()
    hold(counts, reads, vectors, results, (scratch, scratch))


# A piece of a float32 vector is 32 bytes, loaded by halves: the second is in L1.
VECTORS = {("bn.cuh", READ, 16): 2}
# Fewer channels than 64 read two or more rows of the stage at once, and two meet in a bank: once a
# tile.
NARROW = {("conv_warpgroups.cuh", SHARED_READ, 16): 2}


@pytest.mark.parametrize(
    ("channels", "filters", "kernel", "stride", "known"),
    [
        (64, 64, 3, 1, {}),
        (64, 64, 1, 1, {}),
        (128, 128, 3, 1, {}),
        (256, 128, 1, 1, {}),
        (64, 256, 1, 1, {}),
        (128, 512, 1, 1, {}),
        (16, 16, 1, 1, NARROW),
        (32, 32, 1, 1, NARROW),
        (64, 64, 3, 2, {}),
        (128, 128, 3, 2, {}),
        (256, 128, 1, 2, {}),
    ],
)
def test_they_use_whole_sectors_and_no_bank_twice(
    emulator, channels, filters, kernel, stride, known
):
    """Every access of a warp but those known above; in the end of the broad tile, once a block."""
    points, of_broad = [], []
    layer = Layer(torch.bfloat16, channels, filters, kernel, stride)
    for name, arguments in layer.calls().items():
        if name in NAMES and not is_left(name, filters, channels, kernel):
            results = {"preact_conv_forward": filters, "preact_conv_dgrad": channels}.get(name, 0)
            broad = kernel == 1 and stride == 1 and results >= 256
            (of_broad if broad else points).extend(counted(emulator, name, arguments)[1].points)
    assert waste(points) == VECTORS | known
    assert not of_broad or waste(of_broad) == VECTORS | WIDE


# --- what it finds -------------------------------------------------------------------------------

FAULTS = {
    # products that read what has not been made visible to them
    "window": ("preact_conv_forward", "sm90/window.cuh", "  operands_written();\n", ""),
    # a slot that is left while products still read it
    "release": (
        *("preact_conv_forward", "sm90/conv_warpgroups.cuh"),
        *("          products_wait<1>();\n          release();\n", "          release();\n"),
    ),
    # a slot that is filled while products still read it
    "empty": (
        *("preact_conv_forward", "sm90/conv_warpgroups.cuh"),
        *("      barrier_wait(&work.barriers.source_empty[ring.slot], ring.phase ^ 1);\n", ""),
    ),
    # products of a slot that is not full
    "full": (
        *("preact_conv_forward", "sm90/conv_warpgroups.cuh"),
        *("      barrier_wait(&work.barriers.source_full[windows.slot], windows.phase);\n", ""),
    ),
    # likewise where all threads fill the other of two windows meanwhile
    "done": (
        *("preact_conv_wgrad", "sm90/wgrad_by_warpgroups.cu"),
        *("    products_wait<0>();\n    unsigned", "    unsigned"),
    ),
    "filled": (
        *("preact_conv_wgrad", "sm90/wgrad_by_warpgroups.cu"),
        *("    __syncthreads();  // the window is filled", "    // the window is filled"),
    ),
    # a stage of results that is overwritten while others still read it
    "stage": (
        *("preact_conv_forward", "sm90/conv_warpgroups.cuh"),
        *("        __syncwarp();  // the rows before have been read\n", ""),
    ),
}


@pytest.mark.skipif(SANITIZED, reason="builds by itself")
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_show(emulator, tmp_path, fault):
    """A missing fence or wait gives other results, or waits in vain, for some order of threads."""
    name, file, before, after = FAULTS[fault]
    kernel = f"sm90/{name.removeprefix('preact_conv_')}_by_warpgroups.cu"
    cuda = broken(tmp_path, kernel, before, after, file)
    library = build(
        *(tmp_path / "build", f"preact_{fault}"),
        cuda=cuda,
        reuse=emulator.library.parent,
        optimise="-O0",
    )
    wrong = Emulator(library, f"preact_{fault}")
    # many steps of weights that do not stay; many tiles a block
    shape = Shape(4, 128, 12, 13, 128, (3, 3), padding=PAD)
    arguments = calls(shape, torch.bfloat16, True)[name]
    truth = results(reference, name, arguments)

    def is_right(emulator: Emulator, seed: int) -> bool:
        with emulator.device(*DEVICE, warpgroups=True):
            emulator.seed(seed)
            try:
                assert_close(results(emulator.operators, name, arguments), truth, torch.bfloat16)
            except AssertionError:
                return False
            except RuntimeError as error:
                assert "wait for in vain" in str(error)
                return False
        return True

    assert is_right(emulator, 0)
    assert not all(is_right(wrong, seed) for seed in range(4))


@pytest.mark.skipif(SANITIZED, reason="builds by itself")
def test_arrival_that_never_comes_is_named(emulator, tmp_path):
    """Threads that wait in vain, instead of a test that does not end."""
    before = "      warp_arrives(&work.barriers.source_full[ring.slot]);\n"
    kernel = "sm90/forward_by_warpgroups.cu"
    cuda = broken(tmp_path, kernel, before, "", "sm90/conv_warpgroups.cuh")
    library = build(
        tmp_path / "build", "preact_vain", cuda=cuda, reuse=emulator.library.parent, optimise="-O0"
    )
    wrong = Emulator(library, "preact_vain")
    arguments = calls(SHAPES[9], torch.bfloat16, True)["preact_conv_forward"]
    with (
        wrong.device(*DEVICE, warpgroups=True),
        pytest.raises(RuntimeError, match=r"preact_conv_forward.*threads wait for in vain"),
    ):
        wrong.operators.preact_conv_forward(*arguments)
