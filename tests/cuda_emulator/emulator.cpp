#include <ucontext.h>

#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "counters.h"
#include "ptx.cuh"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

Index thread, block, block_size, grid_size;
Device device;
bool recording = false;

namespace {

constexpr size_t kStackBytes = 256 * 1024;

struct Copy {
  void* to;
  const void* from;
};
struct Write {
  void* to;
  preact::cuda::Bytes16 bytes;
};

using Place = void* [5];  // of __builtin_setjmp()

struct Fiber {
  ucontext_t context;  // where it begins
  Place left;          // where it goes on
  std::unique_ptr<char[]> stack;
  bool begun = false;
  Index index;
  bool done = false;
  std::vector<Copy> copies;                     // begun, not yet there, the oldest first
  std::vector<size_t> groups;                   // where in copies each ends; the last are of none
  std::vector<Write> writes;                    // that products do not see yet
  std::vector<std::function<void()>> products;  // of no group yet
  std::deque<std::vector<std::function<void()>>> committed;  // not done, the oldest group first
  Recorded recorded;
  std::vector<Accessed> accessed;
};

struct Warp {
  void* lanes[32];
  int arrived = 0;
  void (*instruction)(void* (&)[32]) = nullptr;
};

std::mt19937_64 order(1);
std::vector<std::unique_ptr<Fiber>> fibers;  // kept from block to block, for their stacks
std::vector<Warp> warps;
std::vector<int> ready;
std::map<const void*, std::vector<int>> sleeping;  // by what they wait for
int threads, waiting, self = 0;
Place scheduler;
unsigned char* shared_bytes_begin;
std::string error;
const std::function<void()>* kernel;

// Only the first switch to a fiber is one of contexts: each of those asks the kernel for a mask of
// signals, and AddressSanitizer cleans a whole stack. It would at a longjmp() as well.
__attribute__((noinline, no_sanitize("address"))) void jump(Place& to) { __builtin_longjmp(to, 1); }
__attribute__((noinline, no_sanitize("address"))) void switch_to(Fiber& fiber) {
  if (__builtin_setjmp(scheduler)) return;
  if (fiber.begun) jump(fiber.left);
  fiber.begun = true;
  setcontext(&fiber.context);
}
__attribute__((noinline, no_sanitize("address"))) void switch_from(Fiber& fiber) {
  if (!__builtin_setjmp(fiber.left)) jump(scheduler);
}

#ifdef __SANITIZE_ADDRESS__
const void* scheduler_stack;
size_t scheduler_stack_bytes;
void* scheduler_fake_stack;
void enter_fiber(Fiber& fiber) {
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack.get(), kStackBytes);
  switch_to(fiber);
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}
void leave_fiber(Fiber& fiber) {
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, scheduler_stack, scheduler_stack_bytes);
  switch_from(fiber);
  __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}
void fiber_began() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
}
#else
void enter_fiber(Fiber& fiber) { switch_to(fiber); }
void leave_fiber(Fiber& fiber) { switch_from(fiber); }
void fiber_began() {}
#endif

void yield() {
  Fiber& fiber = *fibers[self];
  leave_fiber(fiber);
  // Whoever came back here was chosen by the scheduler, which set `self` and `thread`.
}

[[noreturn]] void fail(const std::string& what) {
  if (error.empty()) error = what;
  for (;;) yield();  // the scheduler stops at once and never comes back
}

void begin_fiber() {
  fiber_began();
  for (;;) {  // a block each
    (*kernel)();
    fibers[self]->done = true;
    leave_fiber(*fibers[self]);
  }
}

std::unique_ptr<Fiber> new_fiber(int index) {
  auto fiber = std::make_unique<Fiber>();
  fiber->stack = std::make_unique<char[]>(kStackBytes);
  fiber->index = {static_cast<unsigned>(index), 0, 0};
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack.get();
  fiber->context.uc_stack.ss_size = kStackBytes;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, begin_fiber, 0);
  return fiber;
}

// All lanes of a warp are as far as each other: what they accessed since the last time can be put
// side by side.
void count_warp(int warp) {
  if (!counting) return;
  std::vector<Accessed>* lanes[32];
  for (int l = 0; l < 32; ++l) lanes[l] = &fibers[warp * 32 + l]->accessed;
  count_accesses(lanes, shared_bytes_begin);
}

void run_block(const char* name) {
  error.clear();
  ready.clear();
  waiting = 0;
  warps.assign(threads / 32, {});
  sleeping.clear();
  for (int t = 0; t < threads; ++t) {
    if (static_cast<int>(fibers.size()) <= t) fibers.push_back(new_fiber(t));
    Fiber& fiber = *fibers[t];
    fiber.done = false;
    fiber.copies.clear();
    fiber.groups.clear();
    fiber.writes.clear();
    fiber.products.clear();
    fiber.committed.clear();
    fiber.recorded = {};
    fiber.accessed.clear();
    ready.push_back(t);
  }
  int done = 0;
  while (!ready.empty() && error.empty()) {
    const size_t i = order() % ready.size();
    self = ready[i];
    ready[i] = ready.back();
    ready.pop_back();
    thread = fibers[self]->index;
    enter_fiber(*fibers[self]);
    done += fibers[self]->done;
  }
  for (int warp = 0; warp < threads / 32 && error.empty(); ++warp) count_warp(warp);
  size_t asleep = 0;
  for (const auto& [barrier, waiting_here] : sleeping) asleep += waiting_here.size();
  if (error.empty() && asleep > 0)
    error = "barriers that " + std::to_string(asleep) + " of " + std::to_string(threads) +
            " threads wait for in vain";
  if (error.empty() && done < threads)
    error = "a barrier that " + std::to_string(waiting) + " of " + std::to_string(threads) +
            " threads reached";
  if (error.empty()) return;
  fibers.clear();  // they are somewhere in the middle
  throw std::runtime_error(std::string(name) + ", block (" + std::to_string(block.x) + ", " +
                           std::to_string(block.y) + ", " + std::to_string(block.z) +
                           "): " + error);
}

}  // namespace

void seed(uint64_t value) { order.seed(value); }

unsigned char* shared() { return shared_bytes_begin; }

void barrier() {
  if (++waiting < threads) return yield();
  waiting = 0;
  for (int warp = 0; warp < threads / 32; ++warp) count_warp(warp);
  for (int t = 0; t < threads; ++t)
    if (t != self) ready.push_back(t);
}

void together(void* mine, void (*all)(void* (&lanes)[32])) {
  if (recording) return;
  Warp& warp = warps[self / 32];
  if (warp.arrived > 0 && warp.instruction != all)
    fail("lanes of a warp at different instructions");
  warp.instruction = all;
  warp.lanes[self % 32] = mine;
  if (++warp.arrived < 32) return yield();
  warp.arrived = 0;
  count_warp(self / 32);
  all(warp.lanes);
  for (int t = self / 32 * 32; t < self / 32 * 32 + 32; ++t)
    if (t != self) ready.push_back(t);
}

__attribute__((noinline)) bool count(Access access, const void* p, int bytes) {
  if (recording) {
    count_recorded(access * kSizes + std::countr_zero(static_cast<unsigned>(bytes)));
    if (access == kCopied) ++fibers[self]->recorded.copies[__builtin_return_address(0)];
    return access == kSharedRead || access == kSharedWritten;
  }
  if (counting) fibers[self]->accessed.push_back({__builtin_return_address(0), p, access, bytes});
  return true;
}

void copy_later(void* to, const void* from) { fibers[self]->copies.push_back({to, from}); }

void end_group() { fibers[self]->groups.push_back(fibers[self]->copies.size()); }

void finish_copies(int newest) {
  if (recording) count_recorded(kWaits + newest);
  auto& copies = fibers[self]->copies;
  auto& groups = fibers[self]->groups;
  const int64_t done = std::ssize(groups) - newest;
  if (done <= 0) return;
  const size_t end = groups[done - 1];
  for (size_t i = 0; i < end; ++i) std::memcpy(copies[i].to, copies[i].from, 16);
  copies.erase(copies.begin(), copies.begin() + end);
  groups.erase(groups.begin(), groups.begin() + done);
  for (size_t& group : groups) group -= end;
}

void write_later(void* to, const void* bytes16) {
  Write write{to, {}};
  std::memcpy(&write.bytes, bytes16, 16);
  fibers[self]->writes.push_back(write);
}
void finish_writes() {
  for (const Write& write : fibers[self]->writes) std::memcpy(write.to, &write.bytes, 16);
  fibers[self]->writes.clear();
}

void multiply_later(std::function<void()> product) {
  if (!recording) fibers[self]->products.push_back(std::move(product));
}
void end_products() {
  Fiber& fiber = *fibers[self];
  fiber.committed.push_back(std::move(fiber.products));
  fiber.products.clear();
  if (order() % 2) finish_products(0);  // at once: a group that is done is one that has no products
}
void finish_products(int newest) {
  auto& groups = fibers[self]->committed;
  for (; std::ssize(groups) > newest; groups.pop_front())
    for (const auto& product : groups.front()) product();
}

void sleep(const void* barrier) {
  sleeping[barrier].push_back(self);
  yield();
}
void wake(const void* barrier) {
  const auto found = sleeping.find(barrier);
  if (found == sleeping.end()) return;
  ready.insert(ready.end(), found->second.begin(), found->second.end());
  sleeping.erase(found);
}

void count_recorded(int what, int64_t by) { fibers[self]->recorded.counts[what] += by; }

void check_aligned(const void* p, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % 16) fail(std::string(what) + " at no multiple of 16 bytes");
}

void run(const char* name, const void* symbol, Index grid, int block_threads, int64_t shared_bytes,
         const std::function<void()>& body) {
  if (block_threads % 32) throw std::invalid_argument(std::string(name) + ": no whole warps");
  threads = block_threads;
  kernel = &body;
  block_size = {static_cast<unsigned>(threads), 1, 1};
  grid_size = grid;
  if (recording) {
    record_launch({name, symbol, grid, block_threads, shared_bytes});
    const std::vector<unsigned char> memory(static_cast<size_t>(shared_bytes) + 128);
    const uintptr_t begin = reinterpret_cast<uintptr_t>(memory.data());
    shared_bytes_begin = reinterpret_cast<unsigned char*>((begin + 127) / 128 * 128);
    block = {};
    run_block(name);
    for (int t = 0; t < threads; ++t) count_recorded_thread(fibers[t]->recorded, t % 32 == 31);
    return;
  }
  std::vector<Index> blocks;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) blocks.push_back({x, y, z});
  for (size_t i = blocks.size(); i > 1; --i) std::swap(blocks[i - 1], blocks[order() % i]);
  for (const Index& index : blocks) {
    // Exactly as much as was asked for, so that AddressSanitizer sees every byte beyond.
    const size_t bytes = (static_cast<size_t>(shared_bytes) + 127) / 128 * 128;
    const std::unique_ptr<unsigned char, void (*)(void*)> memory(
        static_cast<unsigned char*>(std::aligned_alloc(128, bytes + (bytes == 0) * 128)),
        std::free);
    std::memset(memory.get(), 0xff, bytes);  // NaN in every format
    shared_bytes_begin = memory.get();
    block = index;
    run_block(name);
  }
}

}  // namespace emulator
