// Loads and stores of kN consecutive elements as float32. Vector = true: the address is a multiple of the access, 16 bytes
// where the dtype gives that many, and no element is masked; else element by element, those at `valid` and beyond read as 0.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../params.h"

namespace dab_fast {

template <typename T>
constexpr DType kDTypeOfElement = DType::float32;
template <>
constexpr DType kDTypeOfElement<__half> = DType::float16;
template <>
constexpr DType kDTypeOfElement<__nv_bfloat16> = DType::bfloat16;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <typename T, int kN>
struct alignas(kN * sizeof(T) < 16 ? kN * sizeof(T) : 16) Pack {
  T values[kN];
};

template <typename T, int kN, bool Vector>
__device__ __forceinline__ void load_as(float (&out)[kN], const void* data, int64_t offset, int valid) {
  const T* p = static_cast<const T*>(data) + offset;
  if constexpr (Vector) {
    const Pack<T, kN> pack = *reinterpret_cast<const Pack<T, kN>*>(p);
#pragma unroll
    for (int i = 0; i < kN; ++i) out[i] = to_float(pack.values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kN; ++i) out[i] = i < valid ? to_float(p[i]) : 0.0f;
  }
}

template <typename T, int kN, bool Vector>
__device__ __forceinline__ void store_as(const float (&values)[kN], void* data, int64_t offset, int valid) {
  T* p = static_cast<T*>(data) + offset;
  if constexpr (Vector) {
    Pack<T, kN> pack;
#pragma unroll
    for (int i = 0; i < kN; ++i) pack.values[i] = from_float<T>(values[i]);
    *reinterpret_cast<Pack<T, kN>*>(p) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      if (i < valid) p[i] = from_float<T>(values[i]);
    }
  }
}

// The dtype is the same for all threads, so the branches do not diverge.
template <int kN, bool Vector>
__device__ __forceinline__ void load(float (&out)[kN], const Operand& x, int64_t offset, int valid) {
  if (x.dtype == DType::float32) {
    load_as<float, kN, Vector>(out, x.data, offset, valid);
  } else if (x.dtype == DType::float16) {
    load_as<__half, kN, Vector>(out, x.data, offset, valid);
  } else {
    load_as<__nv_bfloat16, kN, Vector>(out, x.data, offset, valid);
  }
}

template <int kN, bool Vector>
__device__ __forceinline__ void store(const float (&values)[kN], const Operand& x, int64_t offset, int valid) {
  if (x.dtype == DType::float32) {
    store_as<float, kN, Vector>(values, x.data, offset, valid);
  } else if (x.dtype == DType::float16) {
    store_as<__half, kN, Vector>(values, x.data, offset, valid);
  } else {
    store_as<__nv_bfloat16, kN, Vector>(values, x.data, offset, valid);
  }
}

__device__ __forceinline__ float load_one(const Operand& x, int64_t offset) {
  float value[1];
  load<1, false>(value, x, offset, 1);
  return value[0];
}

__device__ __forceinline__ void store_one(float value, const Operand& x, int64_t offset) {
  const float values[1] = {value};
  store<1, false>(values, x, offset, 1);
}

// Row numbers fit 32 bits (checked by the caller of the kernel), element offsets need not.
__device__ __forceinline__ int64_t row_offset(const Operand& x, const Rows& rows, uint32_t row) {
  const uint32_t size1 = uint32_t(rows.size[1]), size2 = uint32_t(rows.size[2]);
  const uint32_t upper = row / size2;
  return int64_t(upper / size1) * x.stride[0] + int64_t(upper % size1) * x.stride[1] +
         int64_t(row % size2) * x.stride[2];
}

// Sum over `kLanes` neighbouring lanes, the same on each and in the same order on every run.
template <int kLanes>
__device__ __forceinline__ float sum_over_lanes(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

inline size_t element_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// Whether accesses of kN elements at multiples of kN from the start of any row are aligned.
inline bool aligned(const Operand& x, int n) {
  if (!x.data) return true;
  const size_t bytes = n * element_size(x.dtype) < 16 ? n * element_size(x.dtype) : 16;
  const int64_t elements = bytes / element_size(x.dtype);
  return reinterpret_cast<uintptr_t>(x.data) % bytes == 0 && x.stride[0] % elements == 0 &&
         x.stride[1] % elements == 0 && x.stride[2] % elements == 0;
}

}  // namespace dab_fast
