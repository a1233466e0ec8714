// The emulator's counters and the functions by which Python reads them.
//
// A warp's access is what its lanes do at the same program point, each for the same time since the
// warp last met. Where lanes skip a step of a loop, those of different steps come together; the
// kernels step by whole rows of banks and sectors, so that the counts stay the same.
//
// Global memory is moved in sectors of 32 bytes. Shared memory has 32 banks of 4 bytes (CUDA C++
// Programming Guide, "Shared Memory" of compute capability 5.x and later); lanes that want the same
// word share it, different words of a bank are one pass each. Accesses of 8 and 16 bytes a lane,
// ldmatrix's rows and cp.async's writes among them, are served 128 bytes at a time: half a warp, a
// quarter (NVIDIA's developer forum, thread 77228: LDS.128 is 4 requests a warp).
#include "counters.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <map>
#include <set>
#include <unordered_map>

namespace emulator {

bool counting = false;

namespace {

constexpr uintptr_t kSector = 32, kLine = 64;

struct Point {
  Access access;
  int64_t bytes;  // of a lane
  int64_t requests = 0, sectors = 0, used_bytes = 0, passes = 0, fewest_passes = 0;
};

struct Line {
  int64_t read = 0, written = 0;
};

std::map<const void*, Point> points;
std::unordered_map<uintptr_t, Line> lines;  // of global memory, by address / kLine
std::vector<Launch> launches;
Recorded of_warp;  // of the launch that is recorded
std::string text;

struct Request {
  int bytes;
  uintptr_t address[32];
  uint32_t active = 0;
};

void count_global(Point& point, const Request& request) {
  std::set<uintptr_t> sectors, addresses;
  for (int l = 0; l < 32; ++l)
    if (request.active >> l & 1) addresses.insert(request.address[l]);
  for (uintptr_t address : addresses) {
    sectors.insert(address / kSector);
    Line& line = lines[address / kLine];
    (point.access == kWritten ? line.written : line.read) += request.bytes;
  }
  point.sectors += static_cast<int64_t>(sectors.size());
  point.used_bytes += static_cast<int64_t>(addresses.size()) * request.bytes;
}

void count_shared(Point& point, const Request& request, uintptr_t begin) {
  const int words = std::max(request.bytes / 4, 1), lanes_at_once = 32 / words;
  for (int first = 0; first < 32; first += lanes_at_once) {
    std::set<uintptr_t> wanted;
    std::array<int64_t, 32> of_bank{};
    for (int l = first; l < first + lanes_at_once; ++l)
      if (request.active >> l & 1)
        for (int w = 0; w < words; ++w) wanted.insert((request.address[l] - begin) / 4 + w);
    for (uintptr_t word : wanted) ++of_bank[word % 32];
    point.passes += *std::max_element(of_bank.begin(), of_bank.end());
    point.fewest_passes += !wanted.empty();
  }
}

}  // namespace

void count_accesses(std::vector<Accessed>* (&lanes)[32], const unsigned char* shared) {
  std::map<std::pair<const void*, int>, Request> requests;
  std::unordered_map<const void*, Access> accesses;
  for (int l = 0; l < 32; ++l) {
    std::unordered_map<const void*, int> times;
    for (const Accessed& one : *lanes[l]) {
      Request& request = requests[{one.point, times[one.point]++}];
      request.bytes = one.bytes;
      request.address[l] = reinterpret_cast<uintptr_t>(one.address);
      request.active |= 1u << l;
      accesses[one.point] = one.access;
    }
    lanes[l]->clear();
  }
  for (const auto& [key, request] : requests) {
    const Access access = accesses[key.first];
    Point& point = points.try_emplace(key.first, Point{access, request.bytes}).first->second;
    ++point.requests;
    if (access <= kCopied)
      count_global(point, request);
    else
      count_shared(point, request, reinterpret_cast<uintptr_t>(shared));
  }
}

void record_launch(const Launch& launch) { launches.push_back(launch); }

void count_multiplications(int m16n8k16) {
  if (recording) count_recorded(kMultiplications, m16n8k16);
}
void count_matrix_reads(int reads) {
  if (recording) count_recorded(kMatrixRead * kSizes + 4, reads);  // 16 bytes a lane
}

void count_recorded_thread(const Recorded& of_thread, bool last_of_warp) {
  const auto busiest = [](int64_t& count, int64_t of_lane) { count = std::max(count, of_lane); };
  for (int i = 0; i < kRecorded; ++i) busiest(of_warp.counts[i], of_thread.counts[i]);
  for (const auto& [place, count] : of_thread.copies) busiest(of_warp.copies[place], count);
  if (!last_of_warp) return;
  Launch& launch = launches.back();
  launch.warps.push_back(of_warp.counts);
  for (const auto& [place, count] : of_warp.copies) launch.copies[place] += count;
  of_warp = {};
}

int64_t place_of(const void* code) {
  Dl_info self;
  dladdr(reinterpret_cast<const void*>(&place_of), &self);
  return static_cast<const char*>(code) - static_cast<const char*>(self.dli_fbase);
}

}  // namespace emulator

#define PREACT_CONTROL __attribute__((visibility("default")))

extern "C" {

PREACT_CONTROL void emulator_seed(uint64_t value) { emulator::seed(value); }

// Starts anew.
PREACT_CONTROL void emulator_count(int on) {
  emulator::counting = on;
  if (!on) return;
  emulator::points.clear();
  emulator::lines.clear();
}

// Bytes [read, written] in [begin, begin + bytes).
PREACT_CONTROL void emulator_bytes(const void* begin, int64_t bytes, int64_t* out) {
  out[0] = out[1] = 0;
  const uintptr_t first = reinterpret_cast<uintptr_t>(begin);
  for (const auto& [line, moved] : emulator::lines) {
    if (line * emulator::kLine + emulator::kLine <= first) continue;
    if (line * emulator::kLine >= first + static_cast<uintptr_t>(bytes)) continue;
    out[0] += moved.read;
    out[1] += moved.written;
  }
}

// A line for each program point: its place in this library, access, bytes of a lane, requests,
// sectors, used bytes, passes, fewest passes.
PREACT_CONTROL const char* emulator_points() {
  emulator::text.clear();
  for (const auto& [place, p] : emulator::points) {
    for (int64_t value : {emulator::place_of(place), static_cast<int64_t>(p.access), p.bytes,
                          p.requests, p.sectors, p.used_bytes, p.passes, p.fewest_passes})
      emulator::text += std::to_string(value) + " ";
    emulator::text += "\n";
  }
  return emulator::text.c_str();
}

// From now on a device like this, as Device has it; of 0 multiprocessors: the emulator's own again.
PREACT_CONTROL void emulator_device(int multiprocessors, int64_t most_shared_bytes,
                                    int64_t (*resident_blocks)(int64_t, int, int64_t)) {
  emulator::device = emulator::Device{};
  if (multiprocessors > 0) emulator::device = {multiprocessors, most_shared_bytes, resident_blocks};
}

// Whether launches from now on are recorded, not run.
PREACT_CONTROL void emulator_record(int on) {
  emulator::recording = on;
  emulator::launches.clear();
}

// A line for each launch since the last call: the kernel's place in this library, grid, threads,
// shared bytes, each warp's counts, and of each place with asynchronous copies that place and their
// number.
PREACT_CONTROL const char* emulator_launches() {
  emulator::text.clear();
  for (const emulator::Launch& launch : emulator::launches) {
    std::vector<int64_t> values{emulator::place_of(launch.kernel),
                                launch.grid.x,
                                launch.grid.y,
                                launch.grid.z,
                                launch.threads,
                                launch.shared_bytes};
    for (const auto& counts : launch.warps)
      values.insert(values.end(), counts.begin(), counts.end());
    for (const auto& [place, count] : launch.copies)
      values.insert(values.end(), {emulator::place_of(place), count});
    for (int64_t value : values) emulator::text += std::to_string(value) + " ";
    emulator::text += "\n";
  }
  emulator::launches.clear();
  return emulator::text.c_str();
}
}
