// What the convolution kernels share: an implicit GEMM whose operands are windows of pixels.
//
// A block computes a tile of output pixels, a patch of some rows and columns of one or more images.
// For a chunk of channels it copies the window of source pixels that the patch reads into shared
// memory, applies the prologue there, once, and multiplies: row m of the operand is pixel m of the
// patch, and each tap of the kernel reads the same window from another start.
#pragma once

#include <limits>
#include <type_traits>

#include "bn.cuh"
#include "launch.cuh"
#include "reduce.cuh"

namespace preact::cuda {

constexpr int kMostPiecesPerThread = 32;    // of a window: one bit each says which are not padding
constexpr int64_t kWideBytes = 160 * 1024;  // of shared memory that a device has for wide tiles
constexpr int64_t kWidestBytes = 220 * 1024;
constexpr int kMostStages = 4;   // steps that are copied or multiplied at the same time
constexpr int kMostSide = 1024;  // rows or columns of a tile's region
// Tiles whose places are in shared memory: what is stored, multiplied and copied, and the next one.
constexpr int kPlaces = 8;
static_assert(kPlaces >= kMostStages + 2);

// The slot after this one in a ring of as many.
PREACT_DEVICE int next_slot(int slot, int slots) { return slot + 1 < slots ? slot + 1 : 0; }

// The most stages up to kMostStages with which a multiprocessor holds as many blocks as with two:
// waiting blocks hide more than waiting copies do. shared_bytes(stages) is what a block takes.
template <class Kernel, typename F>
int choose_stages(const CudaRuntime& runtime, Kernel kernel, int threads, int64_t most_blocks,
                  const F& shared_bytes) {
  const auto blocks = [&](int stages) {
    if (shared_bytes(stages) > most_shared_bytes(runtime.device)) return int64_t{0};
    return std::min(resident_blocks(kernel, threads, shared_bytes(stages), runtime.device),
                    most_blocks);
  };
  int stages = 2;
  while (stages < kMostStages && blocks(stages + 1) >= blocks(2)) ++stages;
  return stages;
}

// Quotients of numbers in [0, 2^20) by a divisor, by its reciprocal: division takes twenty
// instructions. Half a unit keeps quotients away from where rounding could tip them.
struct SmallDivisor {
  int divisor;
  float inverse;

  PREACT_DEVICE explicit SmallDivisor(int divisor)
      : divisor(divisor), inverse(reciprocal(static_cast<float>(divisor))) {}
  PREACT_DEVICE int operator()(int i) const {
    return static_cast<int>((static_cast<float>(i) + 0.5f) * inverse);
  }
};

// --- geometry ------------------------------------------------------------------------------------

// One axis, rows or columns. Output i of the GEMM reads source pixels
// (i * step + w) * gather + offset for w in [0, taps), with the kernel's element
// weight_first + w * weight_step, and is pixel out_first + i * out_step of the result.
struct Axis {
  int64_t source, outputs;  // how many pixels
  int taps, step, gather;
  int64_t offset;
  int weight_first = 0, weight_step = 1;
  int out_first = 0, out_step = 1;

  __host__ __device__ int window(int patch) const {
    return taps == 0 ? 0 : (patch - 1) * step + taps;
  }
  // The axis of the results in a tensor of `size` pixels: output i is pixel i * gather + offset.
  __host__ __device__ Axis results(int64_t size) const {
    return {size, outputs, 1, 1, out_step, out_first};
  }
};

// Kernel elements [first, first + taps) of a forward convolution.
__host__ __device__ inline Axis forward_axis(int64_t source, int64_t outputs, int first, int taps,
                                             int64_t stride, int64_t pad) {
  const int s = static_cast<int>(stride);
  return {source, outputs, taps, taps == 1 ? 1 : s, taps == 1 ? s : 1, first - pad};
}

// The input pixels x with (x + pad) % stride == phase: their gradient is a convolution of stride 1
// over dy with the kernel's elements phase, phase + stride, ..., last one first.
__host__ __device__ inline Axis dgrad_axis(int64_t input, int64_t output, int64_t kernel,
                                           int64_t stride, int64_t pad, int64_t phase) {
  const int64_t taps = phase < kernel ? (kernel - 1 - phase) / stride + 1 : 0;
  const int64_t first = ((phase - pad) % stride + stride) % stride;
  Axis axis{output, first < input ? (input - 1 - first) / stride + 1 : 0, static_cast<int>(taps), 1,
            1,      (first + pad - phase) / stride - (taps - 1)};
  axis.weight_first = static_cast<int>(phase + stride * (taps - 1));
  axis.weight_step = static_cast<int>(-stride);
  axis.out_first = static_cast<int>(first);
  axis.out_step = static_cast<int>(stride);
  return axis;
}

// A 1x1 convolution that moves no pixel.
inline bool is_pointwise(const ConvShape& shape) {
  return shape.kernel_height == 1 && shape.kernel_width == 1 && shape.stride_height == 1 &&
         shape.stride_width == 1 && shape.input.height == shape.output.height &&
         shape.input.width == shape.output.width && shape.pad_top == 0 && shape.pad_left == 0;
}
// It works on [1, M, C], whatever the images.
inline ConvShape flattened(ConvShape shape) {
  if (is_pointwise(shape)) {
    shape.input = {1, 1, shape.input.pixels(), shape.input.channels};
    shape.output = {1, 1, shape.output.pixels(), shape.output.channels};
  }
  return shape;
}

// The output pixels of a tile: columns run fastest. Several images only if each is there whole.
struct Patch {
  int images, rows, columns;
  // How many patches lie on the axes that it was chosen for, and on all images; a division of 64
  // bits takes a block as long as a hundred multiplications.
  int down, across, tiles;

  __host__ __device__ int pixels() const { return images * rows * columns; }
  __host__ __device__ int window(const Axis& r, const Axis& c) const {
    return images * r.window(rows) * c.window(columns);
  }
};

// The patch of at most `most` pixels that does a convolution with the fewest pixels multiplied and
// copied; r and c are the axes with the most taps and outputs. The first and last pixel of its
// window, and of its results, are less than 2^32 pixels apart in their tensor.
inline Patch choose_patch(int64_t images, const Axis& r, const Axis& c, int most, int most_window) {
  const auto near = [&](const Patch& patch, const Axis& down, const Axis& across) {
    if (std::max(down.window(patch.rows), across.window(patch.columns)) > kMostSide) return false;
    const int64_t rows =
        (patch.images - 1) * down.source + int64_t{down.window(patch.rows)} * down.gather;
    const int64_t columns = int64_t{across.window(patch.columns)} * across.gather;
    return (rows - 1) * across.source + columns <= 0xffffffff;
  };
  const Axis down = r.results(r.outputs * r.out_step), across = c.results(c.outputs * c.out_step);
  const auto fits = [&](const Patch& patch) {
    return patch.window(r, c) <= most_window && near(patch, r, c) && near(patch, down, across);
  };
  const auto count = [&](const Patch& patch) {
    return static_cast<double>(ceil_div(images, patch.images) * ceil_div(r.outputs, patch.rows) *
                               ceil_div(c.outputs, patch.columns));
  };
  Patch best{1, 1, 1, 0, 0, 0};
  double lowest = std::numeric_limits<double>::infinity();
  for (int columns = 1; columns <= std::min<int64_t>(most, c.outputs); ++columns) {
    const int64_t bands = ceil_div(r.outputs, std::min<int64_t>(most / columns, r.outputs));
    Patch patch{1, static_cast<int>(ceil_div(r.outputs, bands)), columns, 0, 0, 0};
    if (patch.rows == r.outputs && columns == c.outputs)
      patch.images = static_cast<int>(std::min<int64_t>(images, most / patch.pixels()));
    if (!fits(patch)) continue;
    const double cost = count(patch) * (most + patch.window(r, c));
    if (cost < lowest) {
      lowest = cost;
      best = patch;
    }
  }
  if (!fits(best))
    throw std::invalid_argument("weight: this kernel size does not fit into shared memory");
  if (count(best) > std::numeric_limits<int>::max())
    throw std::invalid_argument("input: more pixels than 2^31 tiles have");
  best.down = static_cast<int>(ceil_div(r.outputs, best.rows));
  best.across = static_cast<int>(ceil_div(c.outputs, best.columns));
  best.tiles = static_cast<int>(count(best));
  return best;
}

// The first pixel of a patch.
struct Origin {
  int64_t image, row, column;

  PREACT_DEVICE Origin(int tile, const Patch& patch) {
    const auto in_rows = static_cast<unsigned>(tile) / static_cast<unsigned>(patch.across);
    const auto in_images = in_rows / static_cast<unsigned>(patch.down);
    column = int64_t{tile - static_cast<int>(in_rows) * patch.across} * patch.columns;
    row = int64_t{static_cast<int>(in_rows - in_images * static_cast<unsigned>(patch.down))} *
          patch.rows;
    image = int64_t{in_images} * patch.images;
  }
};

// An image, a row and a column of a tile's region in one number, with a spare bit above each, which
// goes where a larger one is subtracted.
constexpr uint32_t kGuards = 1u << 31 | 1u << 21 | 1u << 10;
__host__ __device__ constexpr uint32_t pack(int image, int row, int column) {
  return static_cast<uint32_t>(image << 22 | row << 11 | column);
}
constexpr int kNowhere = 511;  // an image that no patch has

// Where a tile's region lies in its tensor [N, H, W, C]: the first image, row and column that are
// there, the last ones, with 2 * kGuards, and the first element of the region's first pixel, which
// may be none of the tensor's.
struct Place {
  uint32_t first, last;
  int64_t start;

  __host__ __device__ static Place nowhere() { return {1, 2 * kGuards, 0}; }
};

// A pixel of a region, the same in every tile: its image, row and column, and how many of the
// tensor's pixels it is behind the region's first one.
struct alignas(8) RegionPixel {
  uint32_t packed, offset;  // pack(), and kGuards

  PREACT_DEVICE bool inside(const Place& place) const {
    return ((packed - place.first) & (place.last - packed) & kGuards) == kGuards;
  }
  PREACT_DEVICE int64_t element(const Place& place, int64_t channels) const {
    return place.start + int64_t{offset} * channels;
  }
  // The same, from the address of place.start.
  template <typename T>
  PREACT_DEVICE const T* from(const T* start, uint32_t pixel_bytes) const {
    return behind(start, offset, pixel_bytes);
  }
};

// The pixels of a tensor that tiles read, a window each, or write: rows and columns as the axes
// have it. They are counted with columns running fastest; those beyond are never there.
struct Region {
  const Axis& r;
  const Axis& c;
  const Patch& patch;
  int64_t images, channels;

  PREACT_DEVICE Region(const Axis& r, const Axis& c, const Patch& patch, int64_t images,
                       int64_t channels)
      : r(r), c(c), patch(patch), images(images), channels(channels) {}

  // Of one image of the patch.
  PREACT_DEVICE int rows() const { return r.window(patch.rows); }
  PREACT_DEVICE int columns() const { return c.window(patch.columns); }
  PREACT_DEVICE int pixels() const { return patch.window(r, c); }

  PREACT_DEVICE RegionPixel pixel(int i, const SmallDivisor& by_rows,
                                  const SmallDivisor& by_columns) const {
    if (i >= pixels()) return {pack(kNowhere, 0, 0) | kGuards, 0};
    const int above = by_columns(i), image = by_rows(above);
    const int row = above - image * by_rows.divisor, column = i - above * by_columns.divisor;
    const int64_t line = image * r.source + row * r.gather;
    return {pack(image, row, column) | kGuards,
            static_cast<uint32_t>(line * c.source + column * c.gather)};
  }

  PREACT_DEVICE static int clamped(int64_t x, int most) {
    return x < 0 ? 0 : x < most ? static_cast<int>(x) : most;
  }
  // Of `pixels` rows or columns, each `gather` behind the one before, those that lie in [0, size)
  // if the first one is at x: all but a few in a few tiles, so that division is rare.
  PREACT_DEVICE static int first_inside(int64_t x, int gather, int pixels) {
    if (x >= 0) return 0;
    return x + int64_t{pixels} * gather <= 0 ? pixels : (gather - 1 - static_cast<int>(x)) / gather;
  }
  PREACT_DEVICE static int end_inside(int64_t x, int gather, int pixels, int64_t size) {
    const int64_t left = size - x;
    if (left >= int64_t{pixels} * gather) return pixels;
    return left <= 0 ? 0 : (static_cast<int>(left) + gather - 1) / gather;
  }
  PREACT_DEVICE Place place(const Origin& o) const {
    const int64_t y = o.row * r.step * r.gather + r.offset;
    const int64_t x = o.column * c.step * c.gather + c.offset;
    const int there = clamped(images - o.image, patch.images);
    const int top = first_inside(y, r.gather, rows());
    const int left = first_inside(x, c.gather, columns());
    const int bottom = end_inside(y, r.gather, rows(), r.source);
    const int right = end_inside(x, c.gather, columns(), c.source);
    if (there == 0 || top >= bottom || left >= right) return Place::nowhere();
    return {pack(0, top, left), pack(there - 1, bottom - 1, right - 1) + 2 * kGuards,
            ((o.image * r.source + y) * c.source + x) * channels};
  }
};

// Fills the table of a region's first `count` pixels, by all of kThreads threads; a barrier has to
// follow.
template <int kThreads>
PREACT_DEVICE void fill_pixel_table(const Region& region, int count, RegionPixel* table) {
  const SmallDivisor by_rows(region.rows()), by_columns(region.columns());
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads)
    store_shared(table + i, region.pixel(i, by_rows, by_columns));
}

// --- operands ------------------------------------------------------------------------------------

// act(bn(u)) of a piece of u
template <typename T, Activation kActivation>
struct Activate {
  Affine bn;

  PREACT_DEVICE RawPiece<T> operator()(const Piece& u, const Piece&) const {
    return bn.activated<kActivation, T>(u);
  }
};

// h = act(bn(u)), or u itself; without kSilu, act is ReLU
template <typename T, bool kSilu>
struct Activated {
  static constexpr bool kTwo = false;
  using Vectors = Affine;
  Channels channels;
  const T* first;       // u [N, H, W, C]
  const float* affine;  // [4, C] or null
  Activation activation;

  PREACT_DEVICE bool plain() const { return !affine; }
  PREACT_DEVICE Vectors vectors(int64_t channel) const { return Affine(affine, channels, channel); }
  // use(function) of the pieces of the channels that bn is of.
  template <typename F>
  PREACT_DEVICE void with_function(const Vectors& bn, const F& use) const {
    with_activation<kSilu>(activation,
                           [&]<Activation kActivation>() { use(Activate<T, kActivation>{bn}); });
  }
};

// dy of an OutputGrad
template <typename T>
struct Gradient {
  static constexpr bool kTwo = true;
  using Vectors = BnGrad<T>;
  Channels channels;
  const T* first;       // grad [N, P, Q, K]
  const T* output;      // [N, P, Q, K] or null
  const float* affine;  // [4, K]
  const float* sums;    // [2, K] or null
  float inverse_count;  // 1 / M

  Gradient(const OutputGrad& g, const ImageShape& shape)
      : channels(channels_of(shape.channels, {g.grad, g.output, g.affine, g.sums})),
        first(static_cast<const T*>(g.grad)),
        output(static_cast<const T*>(g.output)),
        affine(static_cast<const float*>(g.affine)),
        sums(static_cast<const float*>(g.sums)),
        inverse_count(1.f / static_cast<float>(shape.pixels())) {}

  PREACT_DEVICE bool plain() const { return !output; }

  struct Function {
    BnGrad<T> bn;
    PREACT_DEVICE RawPiece<T> operator()(const Piece& g, const Piece& u) const {
      Piece v;
#pragma unroll
      for (int j = 0; j < kPiece; ++j) v[j] = bn.du(j, g[j], u[j]);
      return raw_piece<T>(v);
    }
  };
  PREACT_DEVICE Vectors vectors(int64_t channel) const {
    return BnGrad<T>(affine, sums, inverse_count, channels, channel);
  }
  template <typename F>
  PREACT_DEVICE void with_function(const Vectors& bn, const F& use) const {
    use(Function{bn});
  }
};

// Elements from one row of a shared tile to the next: 16 bytes more, so that ldmatrix finds eight
// rows in different banks. ldmatrix cannot transpose 32-bit numbers: they are read one by one,
// eight of each of four rows, which takes 32 bytes.
template <typename T>
__host__ __device__ constexpr int pitch(int columns, bool transposed) {
  return columns + (transposed && sizeof(T) == 4 ? 32 : 16) / static_cast<int>(sizeof(T));
}

// Zeros where it is not there.
template <typename T>
PREACT_DEVICE void copy_piece(SharedAddress shared, const T* global, bool there) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i)
    copy16(shared + i * 16, global + i * 16 / static_cast<int>(sizeof(T)), there);
}
template <typename T>
PREACT_DEVICE void copy_piece(T* shared, const T* global, bool there) {
  copy_piece(shared_address(shared), global, there);
}

// Likewise, of a piece that is no vector: numbers `stride` apart, of which the first `valid` are
// there.
template <typename T>
PREACT_DEVICE void store_numbers(T* shared, const T* global, int64_t stride, int valid) {
#pragma unroll 1
  for (int j = 0; j < kPiece; ++j)
    store_shared(shared + j, j < valid ? load(global + j * stride) : T{});
}

// The row of a tile, kPieces pieces each, that thread i copies. Eight threads are one pass over the
// banks: of rows that take 64 + 16 bytes they must have two that are 4 apart, of 32 + 16 bytes four
// that are 2 apart.
template <typename T, int kPieces>
PREACT_DEVICE int row_of_thread(int i) {
  const int row = i / kPieces;
  if constexpr (kPieces * kPiece * sizeof(T) == 64)
    return row / 8 * 8 + row % 2 * 4 + row % 8 / 2;
  else if constexpr (kPieces * kPiece * sizeof(T) == 32)
    return row / 8 * 8 + row % 4 * 2 + row % 8 / 4;
  else
    return row;
}

// Into how many parts the pixels of a weight gradient are split: enough blocks to fill the device,
// but partial results that stay small against the bytes that are moved, and at most one for each of
// `tiles`.
inline int64_t choose_splits(int64_t to_fill, int64_t moved, int64_t partial, int64_t tiles) {
  const int64_t most = std::max<int64_t>(moved / partial, 48);
  return std::clamp<int64_t>(std::min(to_fill, most), 1, tiles);
}

// Of the shared memory for the table of a window's pixels.
constexpr int64_t kTableRounding = 128;
inline int64_t table_bytes(int64_t pixels) {
  return ceil_div(pixels * static_cast<int64_t>(sizeof(RegionPixel)), kTableRounding) *
         kTableRounding;
}

// A block's window of an operand: kPieces pieces of channels for each pixel, zero where the image
// or the channels end. A thread transforms the pieces that it copied, so no barrier lies between.
// kTransposed: multiply() reads it transposed.
template <typename T, class Source, int kPieces, bool kTransposed, int kThreads>
struct Window {
  static constexpr int kPitch = pitch<T>(kPieces * kPiece, kTransposed);
  static constexpr int kRowStep = kThreads / kPieces;
  static constexpr int kMostPixels = kMostPiecesPerThread * kRowStep;

  const Source& source;
  Region region;
  RegionPixel* const table;  // in shared memory
  const int pixels;          // in the table and filled: all of the region's, or more

  PREACT_DEVICE Window(const Source& source, const Axis& r, const Axis& c, const Patch& patch,
                       int64_t images, RegionPixel* table, int pixels)
      : source(source),
        region(r, c, patch, images, source.channels.count),
        table(table),
        pixels(pixels) {}

  PREACT_DEVICE void fill_table() const { fill_pixel_table<kThreads>(region, pixels, table); }

  PREACT_DEVICE static int column() { return static_cast<int>(threadIdx.x) % kPieces * kPiece; }
  PREACT_DEVICE static int first_pixel() {
    return row_of_thread<T, kPieces>(static_cast<int>(threadIdx.x));
  }

  // Starts the copies of channels from `channel` on; pieces that are no vectors are there at once.
  // second is for a Source of two tensors. Returns which of this thread's pieces are not padding.
  PREACT_DEVICE uint32_t fetch(const Place& place, int64_t channel, T* buffer, T* second) const {
    channel += column();
    const int valid = source.channels.valid(channel);
    const Place mine = valid > 0 ? place : Place::nowhere();
    const uint32_t pixel_bytes = static_cast<uint32_t>(source.channels.count * sizeof(T));
    const T* const first = source.first + (place.start + channel);
    const T* first_output = nullptr;
    if constexpr (Source::kTwo)
      if (source.output) first_output = source.output + (place.start + channel);
    uint32_t inside = 0;
    const auto each = [&](const auto& copy) {
      uint32_t bit = 1;
#pragma unroll 1
      for (int w = first_pixel(); w < pixels; w += kRowStep, bit <<= 1) {
        const int at = w * kPitch + column();
        const RegionPixel pixel = load_shared(table + w);
        const bool there = pixel.inside(mine);
        if (there) inside |= bit;
        copy(buffer + at, pixel.from(first, pixel_bytes), there);
        if (first_output) copy(second + at, pixel.from(first_output, pixel_bytes), there);
      }
    };
    if (source.channels.vectors)
      each([](T* shared, const T* global, bool there) { copy_piece(shared, global, there); });
    else
      each([&](T* shared, const T* global, bool there) {
        store_numbers(shared, global, 1, there ? valid : 0);
      });
    return inside;
  }

  // Turns what fetch() copied, and said is inside, into the operand.
  PREACT_DEVICE void transform(int64_t channel, uint32_t inside, T* buffer, const T* second) const {
    channel += column();
    if (source.channels.valid(channel) <= 0 || source.plain()) return;
    source.with_function(source.vectors(channel), [&](const auto& function) {
      // Padding is computed too and not stored: without a jump two pieces are under way at once.
      [[maybe_unused]] constexpr int kAtOnce = Source::kTwo ? 1 : 2;
#pragma unroll kAtOnce
      for (int w = first_pixel(); w < pixels; w += kRowStep, inside >>= 1) {
        const int at = w * kPitch + column();
        Piece v, u{};
        read_piece(buffer + at, v);
        if constexpr (Source::kTwo) read_piece(second + at, u);
        const RawPiece<T> operand = function(v, u);
        if (inside & 1) write_raw_piece(buffer + at, operand);
      }
    });
  }
};

// Where each pixel of a patch has its first tap in the window; pixels beyond the patch read pixel
// 0.
PREACT_DEVICE void fill_row_table(int* table, int rows, const Patch& patch, const Axis& r,
                                  const Axis& c, int row_pitch) {
  const int window_rows = r.window(patch.rows), window_columns = c.window(patch.columns);
  const SmallDivisor by_rows(patch.rows), by_columns(patch.columns);
#pragma unroll 1
  for (int m = static_cast<int>(threadIdx.x); m < rows; m += static_cast<int>(blockDim.x)) {
    const int above = by_columns(m), n = by_rows(above);
    const int i = above - n * patch.rows, j = m - above * patch.columns;
    const int w = (n * window_rows + i * r.step) * window_columns + j * c.step;
    store_shared(table + m, m < patch.pixels() ? w * row_pitch : 0);
  }
}

// Copies W[k0 : k0 + kRows, c0 : c0 + kColumns] of `taps` taps in a row of the kernel, `tap_step`
// apart, into shared memory, kTile elements each; zero beyond the end.
template <typename T, int kRows, int kColumns, int kPitch, int kTile, int kThreads>
PREACT_DEVICE void fetch_weights(const Weight& weight, int64_t output_channels,
                                 const Channels& channels, int64_t k0, int64_t c0, int tap_row,
                                 int tap, int taps, int tap_step, T* shared) {
  constexpr int kPieces = kColumns / kPiece, kRowStep = kThreads / kPieces;
  static_assert(kRowStep * kPieces == kThreads && kRowStep % 8 == 0);
  static_assert(kRows % kRowStep == 0 || kRowStep % kRows == 0);
  const int thread = static_cast<int>(threadIdx.x), row = row_of_thread<T, kPieces>(thread);
  if (row >= kRows) return;
  const int column = thread % kPieces * kPiece, valid = channels.valid(c0 + column);
  const int64_t left = valid > 0 ? output_channels - k0 : 0;
  const int rows_left = left < kRows ? static_cast<int>(left) : kRows;
  T* to = shared + row * kPitch + column;
  const T* from = static_cast<const T*>(weight.data) + tap_row * weight.stride_r +
                  tap * weight.stride_s + (k0 + row) * weight.stride_k +
                  (c0 + column) * weight.stride_c;
  const int64_t next_rows = kRowStep * weight.stride_k, next_tap = tap_step * weight.stride_s;
  if (channels.vectors) {
#pragma unroll 1
    for (int t = 0; t < taps; ++t, to += kTile, from += next_tap) {
      const SharedAddress address = shared_address(to);
      const T* of_row = from;
#pragma unroll
      for (int i = 0; i < kRows; i += kRowStep, of_row += next_rows)
        copy_piece<T>(address + i * kPitch * static_cast<int>(sizeof(T)), of_row,
                      row + i < rows_left);
    }
    return;
  }
#pragma unroll 1
  for (int t = 0; t < taps; ++t, to += kTile, from += next_tap) {
    const T* of_row = from;
#pragma unroll 1
    for (int i = 0; i < kRows; i += kRowStep, of_row += next_rows)
      store_numbers(to + i * kPitch, of_row, weight.stride_c, row + i < rows_left ? valid : 0);
  }
}

// Whether fetch_weights() may copy vectors.
inline Channels weight_channels(const Weight& w, int64_t count) {
  Channels channels = channels_of(count, {w.data});
  channels.vectors = channels.vectors && w.stride_c == 1 && w.stride_k % kPiece == 0 &&
                     w.stride_r % kPiece == 0 && w.stride_s % kPiece == 0;
  return channels;
}

// --- multiplication ------------------------------------------------------------------------------

// A warp's c[t][16 * kM, 8 * kN] += a[16 * kM, 16] b[t][16, 8 * kN] for each t < taps, the columns
// from `live` on left out. a_at(m, i, k) of row 16 * m + i and b_at(t, n, k) point into shared
// memory; transposed means that the row, or n, runs fastest there, else k does. On tensor cores i
// is lane % 16 where a is not transposed. Thread l has c[..][2 * h + e] at row l / 4 + 8 *
// h, column l % 4 * 2 + e.
template <typename T, bool kATransposed, bool kBTransposed, int kTaps, int kM, int kN, typename A,
          typename B>
PREACT_DEVICE void multiply(float (&c)[kTaps][kM][kN][4], int taps, int live, const A& a_at,
                            const B& b_at) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (sizeof(T) == 2) {
    const int low = lane % 8, middle = lane / 8 % 2 * 8, high = lane / 16 * 8;
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      if constexpr (kATransposed)
        load_matrices_transposed(a[m], a_at(m, middle, low + high));
      else
        load_matrices(a[m], a_at(m, lane % 16, high));
    }
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      if (t >= taps) break;
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        if (8 * n >= live) break;
        uint32_t b[4];
        if constexpr (kBTransposed)
          load_matrices_transposed(b, b_at(t, 8 * n + high, low + middle));
        else
          load_matrices(b, b_at(t, 8 * n + low + high, middle));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          matrix_multiply(c[t][m][n], a[m], b[0], b[1], T{});
          matrix_multiply(c[t][m][n + 1], a[m], b[2], b[3], T{});
        }
      }
    }
  } else if constexpr (std::is_same_v<T, tf32>) {
    const int row = lane / 4, column = lane % 4;
#pragma unroll
    for (int k = 0; k < 16; k += 8) {
      uint32_t a[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        if constexpr (kATransposed) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            a[m][i] = __float_as_uint(
                widen(load_shared(a_at(m, row + i % 2 * 8, k + column + i / 2 * 4))));
        } else {
          load_matrices(a[m], a_at(m, lane % 16, k + lane / 16 * 4));
        }
#pragma unroll
        for (uint32_t& one : a[m]) round_to_tf32(one);
      }
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        if (t >= taps) break;
#pragma unroll
        for (int n = 0; n < kN; n += 2) {
          if (8 * n >= live) break;
          uint32_t b[4];
          if constexpr (kBTransposed) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
              b[i] = __float_as_uint(
                  widen(load_shared(b_at(t, 8 * n + row + i / 2 * 8, k + column + i % 2 * 4))));
          } else {
            load_matrices(b, b_at(t, 8 * n + lane % 8 + lane / 16 * 8, k + lane / 8 % 2 * 4));
          }
#pragma unroll
          for (uint32_t& one : b) round_to_tf32(one);
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            matrix_multiply(c[t][m][n], a[m], b[0], b[1], T{});
            matrix_multiply(c[t][m][n + 1], a[m], b[2], b[3], T{});
          }
        }
      }
    }
  } else {
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      if (t >= taps) break;
#pragma unroll 4
      for (int k = 0; k < 16; ++k) {
        float a[kM][2];
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) a[m][h] = load_shared(a_at(m, lane / 4 + 8 * h, k));
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          if (8 * n >= live) break;
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float b = load_shared(b_at(t, 8 * n + lane % 4 * 2 + e, k));
#pragma unroll
            for (int m = 0; m < kM; ++m)
#pragma unroll
              for (int h = 0; h < 2; ++h)
                c[t][m][n][2 * h + e] = fmaf(a[m][h], b, c[t][m][n][2 * h + e]);
          }
        }
      }
    }
  }
}

// Likewise with one b, b_at(n, k).
template <typename T, bool kATransposed, bool kBTransposed, int kM, int kN, typename A, typename B>
PREACT_DEVICE void multiply(float (&c)[kM][kN][4], int live, const A& a_at, const B& b_at) {
  multiply<T, kATransposed, kBTransposed>(reinterpret_cast<float (&)[1][kM][kN][4]>(c), 1, live,
                                          a_at, [&](int, int n, int k) { return b_at(n, k); });
}

}  // namespace preact::cuda
