// What the parts of the emulation tell each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace emulation {

struct Range {
  uintptr_t begin = 0, end = 0;
  static Range of(const void* data, size_t size) {
    return {reinterpret_cast<uintptr_t>(data), reinterpret_cast<uintptr_t>(data) + size};
  }
  bool holds(uintptr_t address, size_t size) const { return address >= begin && address + size <= end; }
};

// The thread of the kernel that runs now.
struct Running {
  uint32_t thread;              // in the grid, blocks one after the other
  uint32_t epoch, block_epoch;  // how many barriers blocks have passed, each block's beginning too; when this one began
  Range stack;
};

// Null while no kernel runs.
const Running* running();

// Ends the launch with an error: the running thread "did this".
[[noreturn]] void fail(const std::string& did_this);

std::string name_of_thread(uint32_t thread_of_grid);

void memory_at_launch(Range parameters, size_t dynamic_shared_bytes);

}  // namespace emulation
