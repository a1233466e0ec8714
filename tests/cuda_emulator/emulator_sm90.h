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

  // Number k of what is summed over, at row or column i.
  template <typename T>
  float at(int i, int k, bool across_pieces) const {
    const int row = across_pieces ? k % 8 : i % 8, column = across_pieces ? i % 8 : k % 8;
    T value;
    std::memcpy(&value, start + i / 8 * across + k / 8 * along + row * kCoreRow + column * 2, 2);
    return widen(value);
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
    for (int h = 0; h < 2; ++h) {
      float of_row[kProductDepth];
      for (int k = 0; k < kProductDepth; ++k) of_row[k] = a.at<T>(row + 8 * h, k, kA);
      for (int j = 0; j < kSums / 4; ++j)
        for (int e = 0; e < 2; ++e) {
          float sum = 0;
          for (int k = 0; k < kProductDepth; ++k)
            sum += of_row[k] * b.at<T>(8 * j + column + e, k, kB);
          float& to = c[4 * j + 2 * h + e];
          to = add ? to + sum : sum;
        }
    }
  });
}

inline bool has_warpgroups(int) { return true; }

}  // namespace preact::cuda
