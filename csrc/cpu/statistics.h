// Per-channel statistics and sums, tile by tile while each is in cache, merged in a fixed order.
#pragma once

#include <tuple>

#include "rows.h"

namespace preact {

// Mean and squared deviations of the values seen so far, a pair a channel, in double.
// Chan, Golub, LeVeque 1983; each tile is summed around its own mean, so that a mean far from zero
// cancels nothing.
struct Moments {
  double* mean;  // [C], anything while count is 0
  double* m2;    // [C]
  double count = 0;

  // Merges `other_count` values with f(c) = {mean, m2} of each channel.
  template <typename F>
  void merge(double other_count, int64_t channels, const F& f) {
    if (count == 0) {
      for (int64_t c = 0; c < channels; ++c) std::tie(mean[c], m2[c]) = f(c);
      count = other_count;
      return;
    }
    const double share = other_count / (count + other_count), both = count * share;
    for (int64_t c = 0; c < channels; ++c) {
      const auto [other_mean, other_m2] = f(c);
      const double delta = other_mean - mean[c];
      mean[c] += delta * share;
      m2[c] += other_m2 + delta * delta * both;
    }
    count += other_count;
  }
};

// Where the sum [C] of a tile is taken, by whoever writes or reads it first; zeros.
template <typename A>
A* tile_sum(int64_t channels) {
  A* const sum = buffer<A>(Buffer::kVectors, 3 * channels);
  std::fill_n(sum, 3 * channels, A(0));
  return sum;
}

// Adds a tile x [rows, channels]; sum is its tile_sum.
template <typename S, typename A = Accumulator<S>>
void add_tile(Moments& moments, const S* x, int64_t rows, int64_t channels, A* sum) {
  A *const shift = sum, *const d1 = sum + channels, *const d2 = d1 + channels;
  const double count = static_cast<double>(rows);
  for (int64_t c = 0; c < channels; ++c) shift[c] = static_cast<A>(sum[c] / count);
  deviation_rows(x, rows, channels, shift, d1, d2);
  moments.merge(count, channels, [&, per_value = 1 / count](int64_t c) {
    const double mean = d1[c] * per_value;
    return std::pair(shift[c] + mean, std::max(0.0, d2[c] - d1[c] * mean));
  });
}

// Moments for each part of the work, and their merger into stats [2, C].
class PartialMoments {
 public:
  PartialMoments(int64_t parts, int64_t channels) : channels_(channels) {
    double* const values = buffer<double>(Buffer::kStatistics, 2 * parts * channels);
    for (int64_t i = 0; i < 2 * parts; i += 2)
      moments_.push_back({values + i * channels, values + (i + 1) * channels});
  }

  Moments& operator[](int64_t part) { return moments_[part]; }

  template <typename A>
  void finish(A* stats) {
    Moments& total = moments_[0];
    for (size_t i = 1; i < moments_.size(); ++i) {
      const Moments& part = moments_[i];
      total.merge(part.count, channels_,
                  [&](int64_t c) { return std::pair(part.mean[c], part.m2[c]); });
    }
    for (int64_t c = 0; c < channels_; ++c) {
      stats[c] = static_cast<A>(total.mean[c]);
      stats[channels_ + c] = static_cast<A>(total.m2[c] / total.count);
    }
  }

 private:
  int64_t channels_;
  std::vector<Moments> moments_;
};

// S1 and S2 for each part of the work, and their sum.
class PartialSums {
 public:
  PartialSums(int64_t parts, int64_t channels)
      : channels_(channels),
        started_(parts),
        values_(buffer<double>(Buffer::kStatistics, 2 * parts * channels)) {}

  // Adds the sums [2, C] of a tile, and clears them for the next. Every part gets one at least.
  template <typename A>
  void add(int64_t part, A* tile) {
    double* const total = values_ + 2 * part * channels_;
    if (!started_[part]) std::fill_n(total, 2 * channels_, 0.0);
    started_[part] = 1;
    for (int64_t c = 0; c < 2 * channels_; ++c) {
      total[c] += tile[c];
      tile[c] = 0;
    }
  }

  // sums [2, C]; the tiles' S2 lack their factor rstd.
  template <typename A>
  void finish(const A* rstd, A* sums) {
    double* const total = values_;
    for (size_t part = 1; part < started_.size(); ++part) {
      const double* const other = values_ + 2 * static_cast<int64_t>(part) * channels_;
      for (int64_t c = 0; c < 2 * channels_; ++c) total[c] += other[c];
    }
    for (int64_t c = 0; c < 2 * channels_; ++c)
      sums[c] = static_cast<A>(c < channels_ ? total[c] : total[c] * rstd[c - channels_]);
  }

 private:
  int64_t channels_;
  std::vector<uint8_t> started_;  // of each part
  double* values_;                // [parts, 2, C]
};

}  // namespace preact
