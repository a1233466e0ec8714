// A host twin of csrc/cuda/sm90/ptx.cuh: test equipment.
//
// Operands are in shared memory once their thread says that they are written, and products are
// computed when their group is committed or as late as it is waited for, as the seed has it: a slot
// that is filled or left too early shows.
#pragma once

namespace preact::cuda {

struct alignas(8) Barrier {
  uint16_t arrivals, missing;
  uint32_t phases;  // that have ended
};

inline void barrier_begin(Barrier* barrier, int arrivals) {
  *barrier = {static_cast<uint16_t>(arrivals), static_cast<uint16_t>(arrivals), 0};
}
inline void barrier_arrive(Barrier* barrier) {
  if (--barrier->missing > 0) return;
  barrier->missing = barrier->arrivals;
  ++barrier->phases;
  emulator::wake(barrier);
}
inline void barrier_wait(Barrier* barrier, int phase) {
  while (!emulator::recording && static_cast<int>(barrier->phases % 2) == phase)
    emulator::sleep(barrier);
}

inline int lane_number() { return static_cast<int>(threadIdx.x) % 32; }

struct Asked {
  int value, lane;
  int answer = 0;
};
inline int of_lane(int value, int lane) {
  Asked mine{value, lane};
  emulator::together(&mine, [](void*(&lanes)[32]) {
    for (void* one : lanes) {
      Asked& asked = *static_cast<Asked*>(one);
      asked.answer = static_cast<Asked*>(lanes[asked.lane % 32])->value;
    }
  });
  return mine.answer;
}

template <int kRegisters>
void take_registers() {}
template <int kRegisters>
void give_registers() {}

PREACT_DEVICE void store_operand(Bytes16* shared, const Bytes16& v) {
  emulator::check_aligned(shared, "store_operand");
  emulator::count(emulator::kSharedWritten, shared, 16);
  emulator::write_later(shared, &v);
}
inline void operands_written() { emulator::finish_writes(); }

struct Operand {
  const unsigned char* start;
  int along, across;

  Operand(const void* shared, int along, int across)
      : start(static_cast<const unsigned char*>(shared)), along(along), across(across) {
    emulator::check_aligned(shared, "an operand");
    if (along % kCoreRow || across % kCoreRow || along >> 18 || across >> 18)
      throw std::invalid_argument("an operand's strides");
  }
  Operand moved(int bytes) const { return {start + bytes, along, across}; }

  // What is summed over of row or column i, to a number after every `step`.
  template <typename T>
  void read(int i, bool across_pieces, float* to, int step) const {
    const unsigned char* const from = start + i / 8 * across;
    for (int piece = 0; piece < kProductDepth / 8; ++piece) {
      T values[8];
      if (!across_pieces) std::memcpy(values, from + piece * along + i % 8 * kCoreRow, kCoreRow);
      for (int k = 0; k < 8; ++k) {
        if (across_pieces)
          std::memcpy(&values[k], from + piece * along + k * kCoreRow + i % 8 * 2, 2);
        to[(8 * piece + k) * step] = widen(values[k]);
      }
    }
  }
};

inline void products_begin() {}
inline void products_commit() { emulator::end_products(); }
template <int kNewest>
void products_wait() {
  emulator::finish_products(kNewest);
}
template <int kSums>
void products_done(float (&)[kSums]) {}

// This thread's sums.
template <bool kA, bool kB, int kSums, typename T>
void warpgroup_multiply(float (&c)[kSums], const Operand& a, const Operand& b, bool add, T) {
  emulator::count_multiplications(kSums / 4);
  emulator::count_matrix_reads(1 + kSums / 32);  // its rows of a, a quarter of b
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
  emulator::multiply_later([=, c = &c[0]] {
    constexpr int kColumns = kSums / 2;  // and two rows
    float of_a[2][kProductDepth], of_b[kProductDepth][kColumns], sums[2][kColumns] = {};
    for (int h = 0; h < 2; ++h) a.read<T>(row + 8 * h, kA, of_a[h], 1);
    for (int i = 0; i < kColumns; ++i)
      b.read<T>(i / 2 * 8 + column + i % 2, kB, &of_b[0][i], kColumns);
    emulator::add_product(sums[0], of_a[0], of_b[0], 2, kColumns, kProductDepth);
    for (int h = 0; h < 2; ++h)
      for (int i = 0; i < kColumns; ++i) {
        float& to = c[i / 2 * 4 + 2 * h + i % 2];
        to = add ? to + sums[h][i] : sums[h][i];
      }
  });
}

inline bool has_warpgroups(int) { return true; }

}  // namespace preact::cuda
