// Looks at every access to memory that a kernel makes: the compiler calls these functions for -fsanitize=thread, whose
// own library is not linked. An access is an error
//   - outside of the memory that the launch may read or write (where a test has said what that is),
//   - to shared memory that no thread of the block has written yet, or beyond what the launch asked for,
//   - where another thread has accessed the same place, one of the two writes, and no barrier lies between them.
// A race is found whatever the order in which threads happen to run.
#include <link.h>

#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "executor.h"

namespace emulation {
namespace {

constexpr size_t kCell = 2;  // bytes: the narrowest element
constexpr uint32_t kNobody = 0xffffffffu, kSeveral = 0xfffffffeu;

struct Cell {
  uint32_t writer = kNobody, written = 0, reader = kNobody, read = 0;  // threads, and the epochs of their accesses
};

struct Region {
  Range range;
  bool writable;
  std::vector<Cell> cells;
};

struct DynamicShared {
  void* (*address)();
  size_t bytes;
};

thread_local char in_shared_memory;
std::vector<Region> tensors;
Region shared;
Range parameters;
std::vector<Range> beyond_shared;  // parts of arrays `extern __shared__` that the launch did not ask for

std::vector<DynamicShared>& dynamic_arrays() {
  static std::vector<DynamicShared> all;
  return all;
}

// The thread-local storage of this library, in this operating system thread.
Range shared_memory() {
  in_shared_memory = 1;  // allocates it
  Range found;
  const auto look = [](dl_phdr_info* library, size_t, void* out) {
    for (int i = 0; i < library->dlpi_phnum; ++i) {
      const ElfW(Phdr)& part = library->dlpi_phdr[i];
      if (part.p_type != PT_TLS || !library->dlpi_tls_data) continue;
      const Range range = Range::of(library->dlpi_tls_data, part.p_memsz);
      if (range.holds(reinterpret_cast<uintptr_t>(&in_shared_memory), 1)) *static_cast<Range*>(out) = range;
    }
    return 0;
  };
  dl_iterate_phdr(look, &found);
  return found;
}

void clear(Region& region) { region.cells.assign((region.range.end - region.range.begin) / kCell + 1, Cell()); }

[[noreturn]] void fail_race(const char* did, uint32_t thread, const char* other_did) {
  fail(std::string(did) + " what " + (thread == kSeveral ? "other threads" : name_of_thread(thread)) + " " + other_did +
       ", without a barrier between");
}

void visit(Region& region, uintptr_t address, size_t size, bool write, const Running& now) {
  // Whether an access of another thread may fall together with this one: in another block, or with no barrier between.
  const auto races = [&](uint32_t thread, uint32_t epoch) {
    return thread != kNobody && thread != now.thread && (epoch < now.block_epoch || epoch == now.epoch);
  };
  for (size_t i = (address - region.range.begin) / kCell; i * kCell < address + size - region.range.begin; ++i) {
    Cell& cell = region.cells[i];
    if (&region == &shared) {  // every block has its own
      if (cell.written < now.block_epoch) cell = Cell();
      if (!write && cell.writer == kNobody) fail("reads shared memory that nothing has written");
    }
    if (races(cell.writer, cell.written)) fail_race(write ? "writes" : "reads", cell.writer, "writes");
    if (write) {
      if (races(cell.reader, cell.read)) fail_race("writes", cell.reader, "reads");
      cell.writer = now.thread;
      cell.written = now.epoch;
    } else {
      const bool joins = cell.reader != kNobody && cell.reader != now.thread && cell.read == now.epoch;
      cell.reader = joins ? kSeveral : now.thread;
      cell.read = now.epoch;
    }
  }
}

void access(const void* data, size_t size, bool write) {
  const Running* now = running();
  if (!now) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  if (now->stack.holds(address, size)) return;
  if (shared.range.holds(address, size)) {
    for (const Range& range : beyond_shared) {
      if (address < range.end && address + size > range.begin) {
        fail("accesses more dynamic shared memory than the launch asked for");
      }
    }
    return visit(shared, address, size, write, *now);
  }
  if (!write) {
    if (parameters.holds(address, size)) return;
    for (const dim3* index : {&threadIdx, &blockIdx, &blockDim, &gridDim}) {
      if (Range::of(index, sizeof *index).holds(address, size)) return;
    }
  }
  for (Region& tensor : tensors) {
    if (tensor.range.holds(address, size) && (tensor.writable || !write)) {
      if (tensor.writable) visit(tensor, address, size, write, *now);
      return;
    }
  }
  if (!tensors.empty()) {
    fail(std::string(write ? "writes" : "reads") + " outside of every tensor that it may " + (write ? "write" : "read"));
  }
}

}  // namespace

bool dynamic_shared(void* (*address)(), size_t bytes) {
  dynamic_arrays().push_back({address, bytes});
  return true;
}

void memory_at_launch(Range given, size_t dynamic_shared_bytes) {
  parameters = given;
  shared.range = shared_memory();
  clear(shared);
  for (Region& tensor : tensors) clear(tensor);
  beyond_shared.clear();
  for (const DynamicShared& array : dynamic_arrays()) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(array.address());
    beyond_shared.push_back({begin + dynamic_shared_bytes, begin + array.bytes});
  }
}

}  // namespace emulation

#define EXPORTED extern "C" __attribute__((visibility("default")))

// From now on kernels may access nothing but what was told here.
EXPORTED void emulation_tensor(uintptr_t address, size_t bytes, int writable) {
  emulation::tensors.push_back({{address, address + bytes}, writable != 0, {}});
}
EXPORTED void emulation_forget_tensors() { emulation::tensors.clear(); }

extern "C" {

void __tls_init() {}  // GCC calls it before an access to an array `extern __shared__`; none is to be initialised

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* x, size_t size) { emulation::access(x, size, false); }
void __tsan_write_range(void* x, size_t size) { emulation::access(x, size, true); }
#define ACCESSES(size)                                                             \
  void __tsan_read##size(void* x) { emulation::access(x, size, false); }           \
  void __tsan_write##size(void* x) { emulation::access(x, size, true); }           \
  void __tsan_unaligned_read##size(void* x) { emulation::access(x, size, false); } \
  void __tsan_unaligned_write##size(void* x) { emulation::access(x, size, true); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

}  // extern "C"
