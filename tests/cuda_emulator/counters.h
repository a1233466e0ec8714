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
};
void record_launch(const Launch& launch);

}  // namespace emulator
