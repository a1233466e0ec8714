// The transformations of 3x3 convolutions that save multiplications; winograd.h has the formulas.
#include "winograd.h"

namespace preact {
namespace {

// Calls f(c, columns) for channels in pieces, most of a constant length.
template <typename F>
PREACT_INLINE void in_pieces(int64_t channels, const F& f) {
  constexpr int64_t kPiece = 16;
  int64_t c = 0;
  for (; c + kPiece <= channels; c += kPiece) f(c, kPiece);
  if (c < channels) f(c, channels - c);
}

// The same with where channel c of the first tile is, of all blocks.
template <typename F>
PREACT_INLINE void in_pieces(int64_t channels, const Transformed& out, const F& f) {
  float* to = out.data;
  for (int64_t first = 0; first < channels; first += out.columns, to += out.block)
    in_pieces(std::min(out.columns, channels - first),
              [&](int64_t c, int64_t columns)
                  PREACT_INLINE_BODY { f(first + c, columns, to + c); });
}

// A row of a transformed tile at a time: four results' addresses, and those of what they are made
// of, are as many as there are registers.

struct Minus {
  static PREACT_INLINE float of(float a, float b) { return a - b; }
};
struct Plus {
  static PREACT_INLINE float of(float a, float b) { return a + b; }
};
struct First {
  static PREACT_INLINE float of(float a, float /*b*/) { return a; }
};

// Calls f(upper, lower, to, columns) for all tiles of a line and pieces of their channels: where
// they begin in rows a and b, and in the row that is made of these.
template <typename F>
PREACT_INLINE void in_line(const float* a, const float* b, int64_t tiles, int64_t channels,
                           const Transformed& out, const F& f) {
  const int64_t pitch = out.pitch;
  in_pieces(channels, out, [&](int64_t first, int64_t columns, float* to) PREACT_INLINE_BODY {
    const float *upper = a + first, *lower = b + first;
    for (int64_t t = 0; t < tiles; ++t) {
      f(upper, lower, to, columns);
      upper += 2 * channels;
      lower += 2 * channels;
      to += pitch;
    }
  });
}

#define PREACT_TILE                                                                  \
  [&](const float* upper, const float* lower, float* __restrict to, int64_t columns) \
      PREACT_INLINE_BODY

// A row of B^T d B, whose row of B^T d is Combine of rows a and b.
template <typename Combine>
PREACT_INLINE void source_row(const float* a, const float* b, int64_t tiles, int64_t channels,
                              const Transformed& out) {
  const int64_t plane = out.plane;
  in_line(
      a, b, tiles, channels, out, PREACT_TILE {
#pragma omp simd
        for (int64_t c = 0; c < columns; ++c) {
          float row[4];
#pragma GCC unroll 4
          for (int64_t j = 0; j < 4; ++j)
            row[j] = Combine::of(upper[j * channels + c], lower[j * channels + c]);
          to[0 * plane + c] = row[0] - row[2];
          to[1 * plane + c] = row[1] + row[2];
          to[2 * plane + c] = row[2] - row[1];
          to[3 * plane + c] = row[3] - row[1];
        }
      });
}

// A row of A dY A^T, whose row of A dY is Combine of rows a and b.
template <typename Combine>
PREACT_INLINE void grad_row(const float* a, const float* b, int64_t tiles, int64_t channels,
                            const Transformed& out) {
  const int64_t plane = out.plane;
  in_line(
      a, b, tiles, channels, out, PREACT_TILE {
#pragma omp simd
        for (int64_t c = 0; c < columns; ++c) {
          const float left = Combine::of(upper[c], lower[c]);
          const float right = Combine::of(upper[channels + c], lower[channels + c]);
          to[0 * plane + c] = left;
          to[1 * plane + c] = left + right;
          to[2 * plane + c] = left - right;
          to[3 * plane + c] = right;
        }
      });
}

// A row of A^T m A, whose row of A^T m is a + b + c, or a - b + c, of three rows of m.
template <bool kUpper>
PREACT_INLINE void products_row(const float* m, int64_t plane, int64_t tiles, int64_t channels,
                                float* y) {
  in_pieces(channels, [&](int64_t first, int64_t columns) PREACT_INLINE_BODY {
    const float *a = m + first, *b = a + 4 * plane;
    const float* c = b + 4 * plane;
    float* __restrict to = y + first;
    for (int64_t t = 0; t < tiles; ++t) {
#pragma omp simd
      for (int64_t i = 0; i < columns; ++i) {
        float row[4];
#pragma GCC unroll 4
        for (int64_t j = 0; j < 4; ++j) {
          const float second = b[j * plane + i];
          row[j] =
              (kUpper ? a[j * plane + i] + second : a[j * plane + i] - second) + c[j * plane + i];
        }
        to[i] = row[0] + row[1] + row[2];
        to[channels + i] = row[1] - row[2] + row[3];
      }
      a += channels;
      b += channels;
      c += channels;
      to += 2 * channels;
    }
  });
}

}  // namespace

PREACT_CLONES void transform_source(int64_t i, const float* d, int64_t pitch, int64_t tiles,
                                    int64_t channels, const Transformed& out) {
  const float *const d1 = d + pitch, *const d2 = d1 + pitch, *const d3 = d2 + pitch;
  if (i == 0)
    source_row<Minus>(d, d2, tiles, channels, out);
  else if (i == 1)
    source_row<Plus>(d1, d2, tiles, channels, out);
  else if (i == 2)
    source_row<Minus>(d2, d1, tiles, channels, out);
  else
    source_row<Minus>(d3, d1, tiles, channels, out);
}

PREACT_CLONES void transform_grad(int64_t i, const float* dy, int64_t pitch, int64_t tiles,
                                  int64_t channels, const Transformed& out) {
  const float* const next = dy + pitch;
  if (i == 0)
    grad_row<First>(dy, dy, tiles, channels, out);
  else if (i == 1)
    grad_row<Plus>(dy, next, tiles, channels, out);
  else if (i == 2)
    grad_row<Minus>(dy, next, tiles, channels, out);
  else
    grad_row<First>(next, next, tiles, channels, out);
}

PREACT_CLONES void transform_products(const float* m, int64_t plane, int64_t tiles,
                                      int64_t channels, int64_t pitch, float* y) {
  products_row<true>(m, plane, tiles, channels, y);
  products_row<false>(m + 4 * plane, plane, tiles, channels, y + pitch);
}

PREACT_CLONES void transform_weights(const float* g, int64_t count, int64_t plane, float* out) {
  in_pieces(count, [&](int64_t first, int64_t columns) PREACT_INLINE_BODY {
    const float* const in = g + first;
    float* __restrict const to = out + first;
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) {
      float rows[4][3];  // G g
#pragma GCC unroll 3
      for (int64_t s = 0; s < 3; ++s) {
        const float top = in[s * count + i], middle = in[(3 + s) * count + i];
        const float bottom = in[(6 + s) * count + i], outer = top + bottom;
        rows[0][s] = top;
        rows[1][s] = 0.5f * (outer + middle);
        rows[2][s] = 0.5f * (outer - middle);
        rows[3][s] = bottom;
      }
#pragma GCC unroll 4
      for (int64_t r = 0; r < 4; ++r) {
        const float outer = rows[r][0] + rows[r][2];
        to[(4 * r + 0) * plane + i] = rows[r][0];
        to[(4 * r + 1) * plane + i] = 0.5f * (outer + rows[r][1]);
        to[(4 * r + 2) * plane + i] = 0.5f * (outer - rows[r][1]);
        to[(4 * r + 3) * plane + i] = rows[r][2];
      }
    }
  });
}

PREACT_CLONES void transform_dweights(const float* m, int64_t count, int64_t plane, int64_t pitch,
                                      float* dg) {
  in_pieces(count, [&](int64_t first, int64_t columns) PREACT_INLINE_BODY {
    const float* const in = m + first;
    float* __restrict const to = dg + first;
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) {
      float rows[3][4];  // G^T m
#pragma GCC unroll 4
      for (int64_t j = 0; j < 4; ++j) {
        const float second = in[(4 + j) * plane + i], third = in[(8 + j) * plane + i];
        const float outer = 0.5f * (second + third);
        rows[0][j] = in[j * plane + i] + outer;
        rows[1][j] = 0.5f * (second - third);
        rows[2][j] = outer + in[(12 + j) * plane + i];
      }
#pragma GCC unroll 3
      for (int64_t r = 0; r < 3; ++r) {
        const float outer = 0.5f * (rows[r][1] + rows[r][2]);
        to[(3 * r + 0) * pitch + i] = rows[r][0] + outer;
        to[(3 * r + 1) * pitch + i] = 0.5f * (rows[r][1] - rows[r][2]);
        to[(3 * r + 2) * pitch + i] = outer + rows[r][3];
      }
    }
  });
}

}  // namespace preact
