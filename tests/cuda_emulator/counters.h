// What a launch moves, warp by warp, and what it was launched with: test equipment.
#pragma once

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

struct Launch {
  const char* name;
  const void* kernel;
  Index grid;
  int threads;
  int64_t shared_bytes;
  // Of the first block: accesses of its threads by access and log2 of bytes, multiplications, waits
  // for copies.
  int64_t accesses[4][5] = {}, multiplications = 0, waits = 0;
};
void record_launch(const Launch& launch);
void count_recorded(Access access, int bytes);
void count_recorded_wait();

}  // namespace emulator
