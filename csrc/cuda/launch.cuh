// Launching and checking, for every kernel.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace dab_fast {

inline void check(cudaError_t status, const char* what, int device) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("dab_fast: ") + what + " on cuda:" + std::to_string(device) + ": " +
                           cudaGetErrorName(status) + ": " + cudaGetErrorString(status));
}

// Makes `device` current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice", device);
    // Always set: it binds this thread to the device's primary context even where this is its first CUDA call.
    check(cudaSetDevice(device), "cudaSetDevice", device);
    changed_ = previous_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// kernel<<<grid, block, shared, stream>>>(params), checked: the error is this launch's own, and is not left behind in the
// runtime for someone else to find.
template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared, int device, void* stream,
            const Args&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, args...);
  if (status != cudaSuccess) cudaGetLastError();
  check(status, name, device);
}

}  // namespace dab_fast
