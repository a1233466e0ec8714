// Where the pixels of a convolution lie for kernels that multiply with wgmma: on a line.
//
// The results' images follow one another, row by row; behind each row are `gap` zeros, behind each
// image `gap` rows of zeros. With stride 2 the input's pixels are four images as large, the phases:
// of even and odd rows and columns. What a tap of an odd kernel reads is then one phase's run of
// positions, as far away for every pixel alike: the operand of each tap is the same window, begun
// elsewhere. What the zeros give is not stored: of 32 x 32 pixels that is 6% of the products, of
// 8 x 8 21%; of a 1x1, nothing.
#pragma once

#include "../conv.cuh"

namespace preact::cuda {

struct Line {
  int images, height, width, gap;

  __host__ __device__ int pitch() const { return width + gap; }
  __host__ __device__ int of_image() const { return (height + gap) * pitch(); }
  // Positions from one to that so many rows, and as many columns, further.
  __host__ __device__ int diagonal(int count) const { return count * (pitch() + 1); }
};

// The pixels (stride * y + row, stride * x + column) of images of this height and width.
struct Phase {
  int height, width, stride, row, column;
};

// A convolution on the line of its results.
struct ConvLine {
  Line line;
  int kernel;         // rows and columns, odd
  int stride;         // 1 or 2
  int height, width;  // of the input's images

  __host__ __device__ Phase results() const { return {line.height, line.width, 1, 0, 0}; }
  // Phases are numbered; those of few taps are the first ones.
  __host__ __device__ int phases() const { return stride * stride; }
  __host__ __device__ Phase input(int phase) const {
    return {height, width, stride, row_of(phase), column_of(phase)};
  }
  __host__ __device__ static int row_of(int phase) { return phase >> 1; }
  __host__ __device__ static int column_of(int phase) { return phase & 1; }
  // Along an axis: the first tap of a phase, and how far before a result what it reads lies; each
  // of the following ones is `stride` taps and one position further.
  __host__ __device__ int first_tap(int of_axis) const {
    return (kernel / 2 + of_axis) & (stride - 1);
  }
  __host__ __device__ int reach(int of_axis) const {
    return (kernel / 2 + of_axis) >> (stride - 1);
  }
  __host__ __device__ bool has_taps(int phase) const {
    return first_tap(row_of(phase)) < kernel && first_tap(column_of(phase)) < kernel;
  }
  // Rows, or columns, that taps read before and behind a result; the gradient of the input is read
  // the other way round.
  __host__ __device__ int before() const { return line.gap; }
  __host__ __device__ int behind() const { return (kernel / 2) >> (stride - 1); }
};

// The line of a convolution with an odd, square kernel, whose results are as large as its input,
// or half as large.
inline bool lies_on_line(const ConvShape& s) {
  const int64_t pad = s.kernel_height / 2, stride = s.stride_height;
  return s.kernel_height == s.kernel_width && s.kernel_height % 2 == 1 && stride <= 2 &&
         s.stride_width == stride && s.pad_top == pad && s.pad_left == pad &&
         s.output.height == ceil_div(s.input.height, stride) &&
         s.output.width == ceil_div(s.input.width, stride);
}
constexpr int64_t kMostPositions = int64_t{1} << 30;  // so that int has room for a tile beyond
constexpr int64_t kMostPitch = int64_t{1} << 19;      // of SmallDivisor
inline int64_t gap_of(const ConvShape& s) { return ceil_div(s.kernel_height / 2, s.stride_height); }
inline int64_t positions_of(const ConvShape& s) {
  return s.output.images * (s.output.height + gap_of(s)) * (s.output.width + gap_of(s));
}
inline ConvLine line_of(const ConvShape& s) {
  const auto number = [](int64_t i) { return static_cast<int>(i); };
  return {
      {number(s.output.images), number(s.output.height), number(s.output.width), number(gap_of(s))},
      number(s.kernel_height),
      number(s.stride_height),
      number(s.input.height),
      number(s.input.width)};
}

struct LineDivisors {
  SmallDivisor pitch, rows;

  PREACT_DEVICE explicit LineDivisors(const Line& line)
      : pitch(line.pitch()), rows(line.height + line.gap) {}
};

// The positions from `first` on, at most an image before the line begins, of a phase of a tensor.
struct Run {
  const Line& line;
  const Phase phase;
  int first, image, row, column;  // without gaps and stride, first alone

  PREACT_DEVICE Run(const Line& line, const Phase& phase, int first)
      : line(line), phase(phase), first(first), image(0), row(0), column(0) {
    if (is_flat()) return;
    const unsigned of_image = static_cast<unsigned>(line.of_image());
    const unsigned pitch = static_cast<unsigned>(line.pitch());
    const unsigned shifted = static_cast<unsigned>(first) + of_image;
    const unsigned images = shifted / of_image, rest = shifted - images * of_image;
    image = static_cast<int>(images) - 1;
    row = static_cast<int>(rest / pitch);
    column = static_cast<int>(rest) - row * line.pitch();
  }
  // The pixel at position first + i, or -1 for a zero; i is less than 2^19.
  PREACT_DEVICE int pixel(int i, const LineDivisors& by) const {
    if (is_flat()) {
      const int at = first + i;
      return at < line.images * line.height * line.width ? at : -1;
    }
    const int x = column + i, down = by.pitch(x), y = row + down, further = by.rows(y);
    const int of_row = (x - down * by.pitch.divisor) * phase.stride + phase.column;
    const int of_image = (y - further * by.rows.divisor) * phase.stride + phase.row;
    const int n = image + further;
    const bool inside =
        of_row < phase.width && of_image < phase.height && n >= 0 && n < line.images;
    return inside ? (n * phase.height + of_image) * phase.width + of_row : -1;
  }

 private:
  PREACT_DEVICE bool is_flat() const { return line.gap == 0 && phase.stride == 1; }
};

}  // namespace preact::cuda
