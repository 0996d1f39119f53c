#include "access.cuh"
#include "cuda.h"
#include "launch.cuh"
#include "partial_sums.cuh"

namespace dab_fast {
namespace {

constexpr int kColumns = 32, kGroups = 8;

__global__ void __launch_bounds__(kColumns* kGroups)
    sum_partials_kernel(const float* partial, int64_t rows, int64_t columns, int64_t count, const Operand out) {
  __shared__ float sums[kGroups][kColumns];
  const int64_t column = int64_t(blockIdx.x) * kColumns + threadIdx.x;
  float sum = 0.0f;
  if (column < count) {
    for (int64_t row = threadIdx.y; row < rows; row += kGroups) sum += partial[row * columns + column];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && column < count) {
    for (int group = 1; group < kGroups; ++group) sum += sums[group][threadIdx.x];
    store_one(sum, out, column);
  }
}

}  // namespace

int cuda_runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion", 0);
  return version;
}

std::pair<int, std::string> cuda_devices() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess) return {count, ""};
  cudaGetLastError();
  return {0, std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status)};
}

int64_t cuda_partial_rows(int64_t rows) {
  // Enough blocks to fill a large GPU, few enough that adding them up stays cheap; a multiple of every block's rows.
  const int64_t most = 256;
  return rows < most ? (rows + 3) / 4 * 4 : most;
}

void sum_partials(const void* partial, int64_t rows, int64_t columns, int64_t column, int64_t count, const Operand& out,
                  const char* name, int device, void* stream) {
  const dim3 grid((count + kColumns - 1) / kColumns);
  launch(name, sum_partials_kernel, grid, dim3(kColumns, kGroups), 0, device, stream,
         static_cast<const float*>(partial) + column, rows, columns, count, out);
}

}  // namespace dab_fast
