// Memory that comes near while matrix products are computed.
//
// A product finds its operands in cache; the loops before and behind it wait for memory. So it is
// computed some rows at a time, and before each time lines are asked for that will be wanted next.
// With AVX-512 products are over before the lines are there: asking takes as long as it saves.
#pragma once

#include "common.h"

namespace preact {

class Ahead {
 public:
  explicit Ahead(bool asks) : most_(asks ? kMost : 0) {}

  // Forgets what has not been asked for.
  void clear() { next_ = count_ = 0; }

  // Values [first, first + count) of a tensor of S will be wanted, in the order of the calls; there
  // is none where it is null.
  template <typename S>
  void want(const void* tensor, int64_t first, int64_t count) {
    if (!tensor || count <= 0 || count_ == most_) return;
    const char* const begin = static_cast<const char*>(tensor) + first * sizeof(S);
    wanted_[count_++] = {begin, begin + count * sizeof(S)};
  }

  // Asks for what comes in the time that so many multiplications take.
  void before(int64_t multiplications) {
    for (int64_t lines = multiplications / kPerLine; next_ < count_ && lines > 0; --lines) {
      Range& range = wanted_[next_];
      __builtin_prefetch(range.begin, 0, 2);  // to L2: L1 is the product's
      range.begin += kLineBytes;
      if (range.begin >= range.end) ++next_;
    }
  }

  // tile.multiply(m, n, k, ...)
  template <typename O, typename A>
  void multiply(const Tile<O, A>& tile, int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb,
                int64_t ldc, bool accumulate, const O* a, const O* b, A* c) {
    while (m > 0) {
      const int64_t rows = next_ < count_ ? std::min(m, kRowsAtOnce) : m;
      before(rows * n * k);
      tile.multiply(rows, n, k, lda, ldb, ldc, accumulate, a, b, c);
      m -= rows;
      a += rows * lda;
      c += rows * ldc;
    }
  }

 private:
  struct Range {
    const char *begin, *end;
  };
  static constexpr int kMost = 4;
  static constexpr int64_t kRowsAtOnce = 48;  // a multiple of the rows that tiles keep in registers
  static constexpr int64_t kPerLine = 256;    // multiplications in the time that a line takes

  const int most_;
  Range wanted_[kMost];
  int next_ = 0, count_ = 0;
};

}  // namespace preact
