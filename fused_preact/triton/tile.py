"""What the kernels call: device functions on tiles of rows (pixels) by columns (channels)."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 x rounded to dtype; the interpreter would cut bfloat16 off, so it is given a hand."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def column_sums(x):
    """The sum over the rows of a tile; a tree, of which the interpreter needs the branches."""
    if INTERPRETED:
        while x.shape[0] > 16:
            x = tl.sum(tl.reshape(x, [x.shape[0] // 16, 16, x.shape[1]]), 1)
    return tl.sum(x, 0)


@triton.jit
def pixels(tile, rows, columns, BLOCK: tl.constexpr):
    """Image (int64), row and column of the BLOCK pixels of a tile, counted through all images."""
    area = rows * columns
    first = tile.to(tl.int64) * BLOCK
    image = first // area
    within = (first - image * area).to(tl.int32) + tl.arange(0, BLOCK)
    return image + within // area, within % area // columns, within % columns


@triton.jit
def tile_of(C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's number of a tile of rows, its rows (int64) and channels, for x [M, C]."""
    blocks = tl.cdiv(C, BLOCK_C)
    tile = tl.program_id(0) // blocks
    m = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return tile, m, c


@triton.jit
def normalise(u, affine, c, C):
    """z = scale * (u - mean) + shift in float32, one expression in every kernel: signs agree.

    affine  [4, C], at the channels c of the tile
    An fma by name: left to compilers, it could be fused in one kernel and rounded twice in another.
    """
    mean = tl.load(affine + c, mask=c < C, other=0.0)
    scale = tl.load(affine + 2 * C + c, mask=c < C, other=0.0)
    shift = tl.load(affine + 3 * C + c, mask=c < C, other=0.0)
    return tl.fma(scale[None, :], u.to(tl.float32) - mean[None, :], shift[None, :])


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z); a NaN stays one."""
    return tl.where(z < 0, 0.0, z) if ACTIVATION == "relu" else z / (1 + tl.exp(-z))


@triton.jit
def slope(z, ACTIVATION: tl.constexpr):
    """act'(z)."""
    if ACTIVATION == "relu":
        result = tl.where(z > 0, 1.0, 0.0)
    else:
        s = tl.sigmoid(z)
        result = s * (1 + z * (1 - s))
    return result


@triton.jit
def batch_norm_grad(g, u, affine, sums, c, C, M):
    """du = scale * g + B * (u - mean) + C, the end of BatchNorm's backward pass, in float32.

    affine  [4, C]
    sums    [2, C]
    """
    scale = tl.load(affine + 2 * C + c, mask=c < C, other=0.0)
    mean = tl.load(affine + c, mask=c < C, other=0.0)
    rstd = tl.load(affine + C + c, mask=c < C, other=0.0)
    s1 = tl.load(sums + c, mask=c < C, other=0.0) / M
    s2 = tl.load(sums + C + c, mask=c < C, other=0.0) / M
    du = scale[None, :] * g.to(tl.float32)
    du -= (scale * rstd * s2)[None, :] * (u.to(tl.float32) - mean[None, :])
    return du - (scale * s1)[None, :]


@triton.jit
def frozen_grad(g, residual, affine, offsets, mask, c, C):
    """du = residual + scale * g, the end of BatchNorm's backward pass with frozen statistics.

    residual  at the tile's offsets, or None
    """
    du = tl.load(affine + 2 * C + c, mask=c < C, other=0.0)[None, :] * g
    if residual is not None:
        du += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    return du


@triton.jit
def store_moments(x, moments, tile, tiles, m, M, c, C, BLOCK_M: tl.constexpr):
    """The moments of a tile x of the rows m, of those below M.

    moments  [3, tiles, C]: a value near the mean, the mean less that, the squared deviations
    A mean far from zero is thus kept to more digits than float32 has.
    """
    first = tile.to(tl.int64) * BLOCK_M
    count = tl.minimum(M - first, BLOCK_M).to(tl.float32)
    rows = (m < M)[:, None]
    near = column_sums(tl.where(rows, x, 0.0)) / count
    deviation = tl.where(rows, x - near[None, :], 0.0)
    rest = column_sums(deviation) / count
    m2 = column_sums(deviation * deviation) - rest * rest * count
    m2 = tl.where(m2 < 0, 0.0, m2)  # a NaN stays one
    target, next_row = moments + tile.to(tl.int64) * C + c, tl.cast(tiles, tl.int64) * C
    tl.store(target, near, mask=c < C)
    tl.store(target + next_row, rest, mask=c < C)
    tl.store(target + 2 * next_row, m2, mask=c < C)


@triton.jit
def store_sums(g, u, affine, sums, tile, c, C):
    """S1 = sum g and S2 = sum g * (u - mean) * rstd of a tile to sums [tiles, 2, C]."""
    mean = tl.load(affine + c, mask=c < C, other=0.0)
    rstd = tl.load(affine + C + c, mask=c < C, other=0.0)
    target = sums + tile.to(tl.int64) * 2 * C + c
    tl.store(target, column_sums(g), mask=c < C)
    s2 = column_sums(g * (u.to(tl.float32) - mean[None, :])) * rstd
    tl.store(target + C, s2, mask=c < C)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b; the interpreter's product of bfloat16 is wrong, so it is given float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)
