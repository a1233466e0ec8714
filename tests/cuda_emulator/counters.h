// What a launch moves, warp by warp, and what it was launched with: test equipment.
#pragma once

#include <array>
#include <map>
#include <vector>

#include "ptx.cuh"

namespace emulator {

extern bool counting;

struct Accessed {
  const void* point;  // in the program
  const void* address;
  Access access;
  int bytes;
};

// What the lanes of a warp accessed between two points where they meet; forgotten afterwards.
void count_accesses(std::vector<Accessed>* (&lanes)[32], const unsigned char* shared);

// What a launch is recorded with: accesses by kind and size, then multiplications, then waits by
// how many groups of copies may still be under way.
constexpr int kAccesses = 6, kSizes = 5;  // 1, 2, 4, 8 and 16 bytes
constexpr int kMultiplications = kAccesses * kSizes, kWaits = kMultiplications + 1;
constexpr int kRecorded = kWaits + 3;

using RecordedCounts = std::array<int64_t, kRecorded>;

// What a thread, or several, did while a launch was recorded.
struct Recorded {
  RecordedCounts counts{};
  std::map<const void*, int64_t> copies;  // asynchronous ones, by their place in the code
};

struct Launch {
  const char* name;
  const void* kernel;
  Index grid;
  int threads;
  int64_t shared_bytes;
  // Of the first block's warps, of each its busiest lane; copies are those of all warps.
  std::vector<RecordedCounts> warps = {};
  std::map<const void*, int64_t> copies = {};
};
void record_launch(const Launch& launch);
void count_recorded(int what, int64_t by = 1);
void count_recorded_thread(const Recorded& of_thread, bool last_of_warp);

}  // namespace emulator
