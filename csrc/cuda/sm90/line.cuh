// Where the pixels of a convolution lie for kernels that multiply with wgmma: on a line.
//
// The images follow one another, row by row; behind each row are `gap` zeros, behind each image
// `gap` rows of zeros. The source of tap (r, s) of an odd kernel that keeps the images' size is
// then (r - gap) * pitch + s - gap positions further, for every pixel alike: the operand of each
// tap is the same run of positions, begun elsewhere. What the zeros give is not stored: of 32 x 32
// pixels that is 6% of the products, of 8 x 8 21%; of a 1x1, nothing.
#pragma once

#include "../conv.cuh"

namespace preact::cuda {

struct Line {
  int images, height, width, gap;

  __host__ __device__ int pitch() const { return width + gap; }
  __host__ __device__ int of_image() const { return (height + gap) * pitch(); }
  // How far the farthest tap lies.
  __host__ __device__ int halo() const { return gap * pitch() + gap; }
  __host__ __device__ int tap(int r, int s) const { return (r - gap) * pitch() + s - gap; }
};

// The line of a convolution with an odd, square kernel, stride 1 and results as large as its
// source.
inline bool lies_on_line(const ConvShape& s) {
  const int64_t gap = s.kernel_height / 2;
  return s.kernel_height == s.kernel_width && s.kernel_height % 2 == 1 && s.stride_height == 1 &&
         s.stride_width == 1 && s.pad_top == gap && s.pad_left == gap &&
         s.input.height == s.output.height && s.input.width == s.output.width;
}
constexpr int64_t kMostPositions = int64_t{1} << 30;  // so that int has room for a tile beyond
constexpr int64_t kMostPitch = int64_t{1} << 19;      // of SmallDivisor
inline int64_t positions_of(const ConvShape& s) {
  const int64_t gap = s.kernel_height / 2;
  return s.input.images * (s.input.height + gap) * (s.input.width + gap);
}
inline Line line_of(const ConvShape& s) {
  return {static_cast<int>(s.input.images), static_cast<int>(s.input.height),
          static_cast<int>(s.input.width), static_cast<int>(s.kernel_height / 2)};
}

struct LineDivisors {
  SmallDivisor pitch, rows;

  PREACT_DEVICE explicit LineDivisors(const Line& line)
      : pitch(line.pitch()), rows(line.height + line.gap) {}
};

// The positions from `first` on, at most an image before the line begins.
struct Run {
  const Line& line;
  int first, image, row, column;  // without gaps, first alone

  PREACT_DEVICE Run(const Line& line, int first)
      : line(line), first(first), image(0), row(0), column(0) {
    if (line.gap == 0) return;
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
    if (line.gap == 0) {
      const int at = first + i;
      return at < line.images * line.height * line.width ? at : -1;
    }
    const int x = column + i, down = by.pitch(x), y = row + down, further = by.rows(y);
    const int of_row = x - down * by.pitch.divisor, of_image = y - further * by.rows.divisor;
    const int n = image + further;
    const bool inside = of_row < line.width && of_image < line.height && n >= 0 && n < line.images;
    return inside ? (n * line.height + of_image) * line.width + of_row : -1;
  }
};

}  // namespace preact::cuda
