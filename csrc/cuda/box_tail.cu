// The last linear of the box MLP, the inverse sigmoid of the old box, sum, sigmoid. Forward: a warp owns a row. Backward: a
// thread owns kVec columns, keeps its part of the weight and of d_weight in registers, and walks over rows.
#include "../geometry.h"
#include "access.cuh"
#include "cuda.h"
#include "launch.cuh"
#include "partial_sums.cuh"

namespace dab_fast {
namespace {

constexpr int kWarp = 32, kWarps = 4;
constexpr int kColumnThreads = 64, kRowThreads = 2;

__device__ __forceinline__ float select(const float (&x)[kBoxOutputs], int i) {
  return i == 0 ? x[0] : (i == 1 ? x[1] : (i == 2 ? x[2] : x[3]));
}

template <int kVec, bool Vector>
__global__ void __launch_bounds__(kWarp* kWarps) box_tail_forward(const __grid_constant__ BoxTail p, uint32_t rows) {
  const int lane = threadIdx.x % kWarp;
  const uint32_t row = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (row >= rows) return;
  const int64_t o_hidden = row_offset(p.hidden, p.rows, row);
  float sums[kBoxOutputs] = {};
  for (int column = lane * kVec; column < p.width; column += kWarp * kVec) {
    const int valid = p.width - column;
    float hidden[kVec];
    load<kVec, Vector>(hidden, p.hidden, o_hidden + column, valid);
#pragma unroll
    for (int j = 0; j < kBoxOutputs; ++j) {
      float weight[kVec];
      load<kVec, Vector>(weight, p.weight, j * p.weight.stride[2] + column, valid);
#pragma unroll
      for (int i = 0; i < kVec; ++i) sums[j] += hidden[i] * weight[i];
    }
  }
#pragma unroll
  for (int j = 0; j < kBoxOutputs; ++j) sums[j] = sum_over_lanes<kWarp>(sums[j]);
  if (lane < kBoxOutputs) {
    const float logit = select(sums, lane) + load_one(p.bias, lane);
    float out = sigmoid(logit);
    if (lane < p.coordinates) {
      out = box_update(logit, load_one(p.boxes, row_offset(p.boxes, p.rows, row) + lane), float(p.eps));
    }
    store_one(out, p.refined, row_offset(p.refined, p.rows, row) + lane);
  }
}

template <int kVec, bool Vector>
__global__ void __launch_bounds__(kColumnThreads* kRowThreads)
    box_tail_backward(const __grid_constant__ BoxTail p, uint32_t rows) {
  const int column = (blockIdx.y * kColumnThreads + threadIdx.x) * kVec, valid = p.width - column;
  const bool owns_columns = valid > 0, first_tile = blockIdx.y == 0;
  float weight[kBoxOutputs][kVec] = {}, d_weight[kBoxOutputs][kVec] = {}, d_bias[kBoxOutputs] = {};
  if (owns_columns) {
#pragma unroll
    for (int j = 0; j < kBoxOutputs; ++j) {
      load<kVec, Vector>(weight[j], p.weight, j * p.weight.stride[2] + column, valid);
    }
  }
  const uint32_t partial_row = blockIdx.x * kRowThreads + threadIdx.y;
  for (uint32_t row = partial_row; row < rows; row += gridDim.x * kRowThreads) {
    float refined[kBoxOutputs], d_refined[kBoxOutputs], d_logits[kBoxOutputs];
    load<kBoxOutputs, Vector>(refined, p.refined, row_offset(p.refined, p.rows, row), kBoxOutputs);
    load<kBoxOutputs, Vector>(d_refined, p.d_refined, row_offset(p.d_refined, p.rows, row), kBoxOutputs);
#pragma unroll
    for (int j = 0; j < kBoxOutputs; ++j) {
      d_logits[j] = box_update_backward(d_refined[j], refined[j]);
      d_bias[j] += d_logits[j];
    }
    if (p.d_boxes.data && first_tile && int(threadIdx.x) < p.coordinates) {
      const float box = load_one(p.boxes, row_offset(p.boxes, p.rows, row) + threadIdx.x);
      const float d = select(d_logits, threadIdx.x) * inverse_sigmoid_derivative(box, float(p.eps), p.bounds_pass);
      store_one(d, p.d_boxes, row_offset(p.d_boxes, p.rows, row) + threadIdx.x);
    }
    if (p.d_hidden.data && owns_columns) {
      float d_hidden[kVec] = {};
#pragma unroll
      for (int j = 0; j < kBoxOutputs; ++j) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) d_hidden[i] += d_logits[j] * weight[j][i];
      }
      store<kVec, Vector>(d_hidden, p.d_hidden, row_offset(p.d_hidden, p.rows, row) + column, valid);
    }
    if (p.d_weight.data && owns_columns) {
      float hidden[kVec];
      load<kVec, Vector>(hidden, p.hidden, row_offset(p.hidden, p.rows, row) + column, valid);
#pragma unroll
      for (int j = 0; j < kBoxOutputs; ++j) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) d_weight[j][i] += d_logits[j] * hidden[i];
      }
    }
  }
  if (!p.partial) return;
  float* partial = static_cast<float*>(p.partial) + int64_t(partial_row) * kBoxOutputs * (p.width + 1);
  if (owns_columns) {
    for (int j = 0; j < kBoxOutputs; ++j) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        if (i < valid) partial[j * p.width + column + i] = d_weight[j][i];
      }
    }
  }
  if (first_tile && threadIdx.x < kBoxOutputs) {
    partial[kBoxOutputs * p.width + threadIdx.x] = select(d_bias, threadIdx.x);
  }
}

bool vectorizes(const BoxTail& p, int vec) {
  return p.width % vec == 0 && p.weight.stride[2] % vec == 0 && aligned(p.hidden, vec) && aligned(p.weight, vec) &&
         aligned(p.d_hidden, vec) && aligned(p.refined, kBoxOutputs) && aligned(p.d_refined, kBoxOutputs);
}

}  // namespace

void cuda_box_tail(const BoxTail& p, int device, void* stream) {
  const uint32_t rows = uint32_t(p.rows.count());
  if (!rows) return;
  const DeviceGuard guard(device);
  const int vec = p.hidden.dtype == DType::float32 ? 4 : 8;
  const auto kernel = vec == 4 ? (vectorizes(p, 4) ? box_tail_forward<4, true> : box_tail_forward<4, false>)
                               : (vectorizes(p, 8) ? box_tail_forward<8, true> : box_tail_forward<8, false>);
  launch("box_tail_forward", kernel, dim3((rows + kWarps - 1) / kWarps), dim3(kWarp * kWarps), 0, device, stream, p,
         rows);
}

void cuda_box_tail_backward(const BoxTail& p, int device, void* stream) {
  const uint32_t rows = uint32_t(p.rows.count());
  if (!rows) return;
  const DeviceGuard guard(device);
  const int vec = p.hidden.dtype == DType::float32 ? 4 : 8;
  const auto kernel = vec == 4 ? (vectorizes(p, 4) ? box_tail_backward<4, true> : box_tail_backward<4, false>)
                               : (vectorizes(p, 8) ? box_tail_backward<8, true> : box_tail_backward<8, false>);
  const int tile = kColumnThreads * vec;
  const int64_t partial_rows = cuda_partial_rows(rows);  // also where nothing is summed
  const dim3 grid(uint32_t(partial_rows) / kRowThreads, (p.width + tile - 1) / tile);
  launch("box_tail_backward", kernel, grid, dim3(kColumnThreads, kRowThreads), 0, device, stream, p, rows);
  const int64_t columns = kBoxOutputs * (int64_t(p.width) + 1), weights = kBoxOutputs * int64_t(p.width);
  if (p.d_weight.data) {
    sum_partials(p.partial, partial_rows, columns, 0, weights, p.d_weight, "box_tail_backward (d_weight)", device,
                 stream);
  }
  if (p.d_bias.data) {
    sum_partials(p.partial, partial_rows, columns, weights, kBoxOutputs, p.d_bias, "box_tail_backward (d_bias)",
                 device, stream);
  }
}

}  // namespace dab_fast
