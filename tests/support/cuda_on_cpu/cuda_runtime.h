// What csrc/cuda uses of the CUDA runtime, so that a C++ compiler takes kernels as they are; executor.cpp runs them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
// A storage class that both `__shared__ float x[8];` in a function and `extern __shared__ float x[];` allow, and that
// puts all shared memory into one place, the library's thread-local storage, where memory.cpp looks for it.
#define __shared__ thread_local

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
};
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t);
const char* cudaGetErrorString(cudaError_t);  // of cudaErrorLaunchFailure: what the last kernel did wrong

namespace emulation {

void barrier();
float shuffle_xor(unsigned mask, float value, int lane_mask);

// Calls run(parameters) once for every thread of the grid.
cudaError_t launch(const cudaLaunchConfig_t&, const void* parameters, size_t bytes, void (*run)(const void*));

// Tells of an array declared `extern __shared__`: where this operating system thread has it, and its size.
bool dynamic_shared(void* (*address)(), size_t bytes);

}  // namespace emulation

inline void __syncthreads() { emulation::barrier(); }
inline float __shfl_xor_sync(unsigned mask, float value, int lane_mask) {
  return emulation::shuffle_xor(mask, value, lane_mask);
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), const Args&... args) {
  using Given = std::tuple<void (*)(Params...), std::tuple<Params...>>;
  const Given given(kernel, std::tuple<Params...>(args...));
  return emulation::launch(*config, &given, sizeof given, [](const void* data) {
    const auto& [function, parameters] = *static_cast<const Given*>(data);
    std::apply(function, parameters);
  });
}
