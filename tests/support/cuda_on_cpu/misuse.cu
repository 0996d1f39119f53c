// Kernels that are wrong, each in one way: tests/test_cuda_on_cpu.py holds the emulation to noticing.
#include <cuda_runtime.h>

#include <string>

namespace dab_fast {
namespace {

constexpr int kThreads = 64;

struct alignas(16) Four {
  float values[4];
};

__global__ void nothing_wrong(float* x) {
  __shared__ float shared[kThreads];
  extern __shared__ float dynamic[];
  const int i = threadIdx.x;
  x += blockIdx.x * kThreads;
  shared[i] = x[i];
  dynamic[i] = float(i);
  __syncthreads();
  float sum = shared[kThreads - 1 - i] + dynamic[i ^ 1];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  x[i] = sum;
}

__global__ void no_barrier_before_a_read(float* x) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = 1.0f;
  x[threadIdx.x] = shared[threadIdx.x ^ 1];
}

__global__ void no_barrier_before_the_next_write(float* x) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = 1.0f;
  __syncthreads();
  x[threadIdx.x] = shared[threadIdx.x ^ 1];
  shared[threadIdx.x] = 2.0f;
}

__global__ void unwritten_shared_memory(float* x) {
  __shared__ float shared[kThreads];
  if (blockIdx.x == 0) shared[threadIdx.x] = 1.0f;
  if (blockIdx.x == 1) x[threadIdx.x] = shared[threadIdx.x];
}

__global__ void blocks_write_the_same(float* x) { x[threadIdx.x] = 1.0f; }

__global__ void shuffle_after_lanes_returned(float* x) {
  if (threadIdx.x % 32 >= 16) return;
  x[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

__global__ void shuffle_while_lanes_are_at_a_barrier(float* x) {
  if (threadIdx.x % 32 < 16) {
    x[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
    __syncthreads();
  } else {
    __syncthreads();
    x[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  }
}

__global__ void shuffle_from_a_lane_not_named(float* x) {
  if (threadIdx.x % 32 < 16) x[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.0f, 16);
}

__global__ void different_shuffles(float* x) {
  const int step = threadIdx.x % 2 ? 1 : 2;
  x[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, step);
}

__global__ void barrier_after_threads_returned(float* x) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
  x[threadIdx.x] = 1.0f;
}

__global__ void misaligned_load(float* x) {
  const Four four = *reinterpret_cast<const Four*>(x + threadIdx.x);
  x[threadIdx.x] = four.values[0] + four.values[3];
}

__global__ void index_out_of_bounds(float* x) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x + 1] = 1.0f;
  x[threadIdx.x] = shared[threadIdx.x + 1];
}

__global__ void write_after_the_end(float* x) { x[2 * kThreads + threadIdx.x] = 1.0f; }

__global__ void read_before_the_beginning(float* x) { x[threadIdx.x] = x[int(threadIdx.x) - 1]; }

__global__ void too_much_dynamic_shared_memory(float* x) {
  extern __shared__ float dynamic[];
  dynamic[threadIdx.x + 1] = x[threadIdx.x];
}

constexpr struct {
  const char* name;
  void (*kernel)(float*);
} kKernels[] = {
#define KERNEL(name) {#name, name}
    KERNEL(nothing_wrong),
    KERNEL(no_barrier_before_a_read),
    KERNEL(no_barrier_before_the_next_write),
    KERNEL(unwritten_shared_memory),
    KERNEL(blocks_write_the_same),
    KERNEL(shuffle_after_lanes_returned),
    KERNEL(shuffle_while_lanes_are_at_a_barrier),
    KERNEL(shuffle_from_a_lane_not_named),
    KERNEL(different_shuffles),
    KERNEL(barrier_after_threads_returned),
    KERNEL(misaligned_load),
    KERNEL(index_out_of_bounds),
    KERNEL(write_after_the_end),
    KERNEL(read_before_the_beginning),
    KERNEL(too_much_dynamic_shared_memory),
};

}  // namespace
}  // namespace dab_fast

// Launches kernel `name` with two blocks of 64 threads, or of `threads`, on x: [128]. What was wrong, or "".
extern "C" __attribute__((visibility("default"))) const char* misuse(const char* name, float* x, int threads) {
  for (const auto& [known, kernel] : dab_fast::kKernels) {
    if (std::string(known) != name) continue;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(2);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = dab_fast::kThreads * sizeof(float);
    return cudaGetErrorString(cudaLaunchKernelEx(&config, kernel, x));
  }
  return "there is no such kernel";
}
