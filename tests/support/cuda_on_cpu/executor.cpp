// Runs the blocks of a grid one after the other. Every thread of a block is a fiber, which runs until it waits: at
// __syncthreads for the whole block, at a shuffle for the lanes its mask names. When all wait, those go on who are
// complete; if there are none, the kernel would hang or be undefined on a GPU, and the launch ends with an error.
#include "executor.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 64 << 10, kSharedBytes = 48 << 10;  // more shared memory wants an attribute of the kernel

struct Fiber {
  std::unique_ptr<char[]> stack;
  ucontext_t beginning;
  jmp_buf left;  // where it goes on; swapcontext would ask the kernel for the signal mask every time
  bool begun = false;
};

enum class State { fresh, ready, at_barrier, at_shuffle, returned };

struct Thread {
  State state = State::fresh;
  Fiber* fiber = nullptr;
  unsigned mask = 0;
  int lane_mask = 0;
  float given = 0, received = 0;
};

struct Grid {
  dim3 size, block_size;
  const void* parameters;
  void (*run)(const void*);
  std::vector<unsigned> order;  // of the threads of a block
  std::vector<Thread> threads;
  std::deque<unsigned> ready;
  unsigned current = 0;
  uint32_t block_number = 0;
  Running running{};

  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> idle;
  Fiber main;
  Fiber* fiber = &main;
};

Grid* grid = nullptr;
int order_of_threads = 0;
std::string failure;

dim3 place(uint32_t number, const dim3& size) {
  return {number % size.x, number / size.x % size.y, number / size.x / size.y};
}

std::string text_of(const dim3& x) {
  return "(" + std::to_string(x.x) + ", " + std::to_string(x.y) + ", " + std::to_string(x.z) + ")";
}

std::string hex(unsigned x) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", x);
  return text;
}

// 0 ... count - 1, upwards, downwards, or shuffled.
std::vector<unsigned> some_order(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (order_of_threads < 0) std::reverse(order.begin(), order.end());
  if (order_of_threads > 0) std::shuffle(order.begin(), order.end(), std::mt19937(order_of_threads));
  return order;
}

void run_threads();

Fiber* new_fiber() {
  grid->fibers.push_back(std::make_unique<Fiber>());
  Fiber* made = grid->fibers.back().get();
  made->stack.reset(new char[kStackBytes]);
  getcontext(&made->beginning);
  made->beginning.uc_stack.ss_sp = made->stack.get();
  made->beginning.uc_stack.ss_size = kStackBytes;
  made->beginning.uc_link = nullptr;
  makecontext(&made->beginning, run_threads, 0);
  return made;
}

Fiber* idle_fiber() {
  if (grid->idle.empty()) return new_fiber();
  Fiber* found = grid->idle.back();
  grid->idle.pop_back();
  return found;
}

[[noreturn]] void enter(Fiber* target) {
  grid->fiber = target;
  if (std::exchange(target->begun, true)) _longjmp(target->left, 1);
  setcontext(&target->beginning);
  std::abort();
}

void switch_to(Fiber* target) {
  if (target != grid->fiber && !_setjmp(grid->fiber->left)) enter(target);
}

const char* what_it_does(State state) {
  return state == State::returned ? "has returned" : state == State::at_barrier ? "waits at __syncthreads" : "does not";
}

// Exchanges among the lanes that `thread` waits for, if all are there.
bool exchange(unsigned thread) {
  std::vector<Thread>& threads = grid->threads;
  const unsigned warp = thread / kWarp * kWarp, mask = threads[thread].mask;
  const auto waits = [&](unsigned lane) {
    return warp + lane < threads.size() && threads[warp + lane].state == State::at_shuffle &&
           threads[warp + lane].mask == mask && threads[warp + lane].lane_mask == threads[thread].lane_mask;
  };
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1 && !waits(lane)) return false;
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) {
      threads[warp + lane].received = threads[warp + (lane ^ threads[thread].lane_mask)].given;
      threads[warp + lane].state = State::ready;
    }
  }
  return true;
}

[[noreturn]] void fail_waiting() {
  std::vector<Thread>& threads = grid->threads;
  for (unsigned i = 0; i < threads.size(); ++i) {
    if (threads[i].state != State::at_shuffle) continue;
    grid->current = i;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      const unsigned other = i / kWarp * kWarp + lane;
      if (!(threads[i].mask >> lane & 1)) continue;
      const std::string named = "__shfl_xor_sync: mask " + hex(threads[i].mask) + " names lane " + std::to_string(lane);
      if (other >= threads.size()) fail(named + ", which the block does not have");
      if (threads[other].state != State::at_shuffle) fail(named + ", which " + what_it_does(threads[other].state));
      if (threads[other].mask != threads[i].mask || threads[other].lane_mask != threads[i].lane_mask) {
        fail(named + ", which is at another shuffle");
      }
    }
  }
  for (unsigned i = 0; i < threads.size(); ++i) {
    if (threads[i].state == State::at_barrier) {
      grid->current = i;
      fail("__syncthreads: other threads of the block have returned without it");
    }
  }
  std::abort();
}

// Called when every thread waits or has returned. False: all have returned.
bool let_some_go_on() {
  std::vector<Thread>& threads = grid->threads;
  const auto count = [&](State state) {
    return std::count_if(threads.begin(), threads.end(), [=](const Thread& t) { return t.state == state; });
  };
  if (count(State::returned) == int64_t(threads.size())) return false;
  bool any = false;
  for (unsigned i = 0; i < threads.size(); ++i) {
    if (threads[i].state == State::at_shuffle) any |= exchange(i);
  }
  if (!any) {
    // A thread that has returned does not hold the others up on a GPU, but nothing here is meant to rely on that.
    if (count(State::at_barrier) != int64_t(threads.size())) fail_waiting();
    ++grid->running.epoch;
    for (Thread& thread : threads) thread.state = State::ready;
  }
  for (unsigned i : grid->order) {
    if (threads[i].state == State::ready) grid->ready.push_back(i);
  }
  return true;
}

// Goes on with another thread, or with launch() if the block is done.
void run_another() {
  if (grid->ready.empty() && !let_some_go_on()) {
    switch_to(&grid->main);
    return;
  }
  grid->current = grid->ready.front();
  grid->ready.pop_front();
  threadIdx = place(grid->current, grid->block_size);
  Thread& next = grid->threads[grid->current];
  if (next.state == State::fresh) next.fiber = idle_fiber();
  switch_to(next.fiber);
}

// The body of every fiber: one thread after the other.
void run_threads() {
  for (;;) {
    grid->run(grid->parameters);
    grid->threads[grid->current].state = State::returned;
    grid->idle.push_back(grid->fiber);
    run_another();
  }
}

void wait(State state) {
  grid->threads[grid->current].state = state;
  run_another();
}

cudaError_t refuse(cudaError_t error, const std::string& why) {
  failure = why;
  return error;
}

}  // namespace

const Running* running() {
  if (!grid || grid->fiber == &grid->main) return nullptr;
  Running& now = grid->running;
  now.thread = uint32_t(grid->block_number * grid->threads.size() + grid->current);
  now.stack = Range::of(grid->fiber->stack.get(), kStackBytes);
  return &now;
}

std::string name_of_thread(uint32_t thread) {
  const uint32_t threads = uint32_t(grid->threads.size());
  return "thread " + text_of(place(thread % threads, grid->block_size)) + " of block " +
         text_of(place(thread / threads, grid->size));
}

void fail(const std::string& did_this) {
  if (!running()) {
    std::fprintf(stderr, "outside of a kernel: %s\n", did_this.c_str());
    std::abort();
  }
  failure = name_of_thread(running()->thread) + ": " + did_this;
  enter(&grid->main);  // what lies on the stacks of the threads is left as it is
}

void barrier() { wait(State::at_barrier); }

float shuffle_xor(unsigned mask, float value, int lane_mask) {
  const unsigned lane = grid->current % kWarp, source = lane ^ unsigned(lane_mask);
  if (!(mask >> lane & 1)) fail("__shfl_xor_sync: mask " + hex(mask) + " does not name the calling lane");
  if (source >= kWarp || !(mask >> source & 1)) {
    fail("__shfl_xor_sync: mask " + hex(mask) + " does not name lane " + std::to_string(source) + ", which is read");
  }
  const unsigned me = grid->current;
  grid->threads[me].mask = mask;
  grid->threads[me].lane_mask = lane_mask;
  grid->threads[me].given = value;
  wait(State::at_shuffle);
  return grid->threads[me].received;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* parameters, size_t bytes, void (*run)(const void*)) {
  const dim3 &size = config.gridDim, &block = config.blockDim;
  const uint64_t blocks = uint64_t(size.x) * size.y * size.z, threads = uint64_t(block.x) * block.y * block.z;
  if (!blocks || !threads || threads > 1024 || block.z > 64 || size.x > 0x7fffffffu || size.y > 65535 || size.z > 65535) {
    return refuse(cudaErrorInvalidConfiguration, "grid " + text_of(size) + ", block " + text_of(block));
  }
  if (config.dynamicSmemBytes > kSharedBytes || bytes > 4096) {
    return refuse(cudaErrorInvalidValue, "too much shared memory, or too many bytes of parameters");
  }
  Grid now;
  now.size = size;
  now.block_size = block;
  now.parameters = parameters;
  now.run = run;
  now.order = some_order(unsigned(threads));
  memory_at_launch(Range::of(parameters, bytes), config.dynamicSmemBytes);
  failure.clear();
  now.main.begun = true;
  gridDim = size;
  blockDim = block;
  grid = &now;
  for (unsigned number : some_order(unsigned(blocks))) {
    now.block_number = number;
    blockIdx = place(number, size);
    now.threads.assign(threads, Thread());
    now.ready.assign(now.order.begin(), now.order.end());
    now.running.block_epoch = ++now.running.epoch;
    run_another();
    if (!failure.empty()) break;
  }
  grid = nullptr;
  return failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emulation

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : emulation::refuse(cudaErrorInvalidDevice, "there is one device");
}
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 0, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
  }
  return "unknown";
}

const char* cudaGetErrorString(cudaError_t) { return emulation::failure.c_str(); }

// 0: threads and blocks run upwards; -1: downwards; else shuffled with this seed.
extern "C" __attribute__((visibility("default"))) void emulation_order(int order) { emulation::order_of_threads = order; }
