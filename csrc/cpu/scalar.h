// Rows of float32, float16, bfloat16 or float64 to and from the type that computes; branch-free, so that they vectorize.
#pragma once

#include <stdint.h>
#include <string.h>

#include "../macros.h"
#include "../params.h"

namespace dab_fast {
inline namespace DAB_ISA {

DAB_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

DAB_INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

DAB_INLINE float from_bfloat16(uint16_t x) { return float_of(uint32_t(x) << 16); }

DAB_INLINE uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t(x != x ? 0x7fc0u : rounded);
}

// float16 has exponent bias 15 where float32 has 127, and 13 fewer bits of mantissa.
DAB_INLINE float from_float16(uint16_t x) {
  const uint32_t magnitude = uint32_t(x & 0x7fffu) << 13;
  const float normal = float_of(magnitude + (magnitude >= (0x7c00u << 13) ? 224u << 23 : 112u << 23));
  const float subnormal = float_of(magnitude + (113u << 23)) - 6.103515625e-5f;
  const float value = magnitude < (0x0400u << 13) ? subnormal : normal;
  return float_of(bits_of(value) | uint32_t(x & 0x8000u) << 16);
}

DAB_INLINE uint16_t to_float16(float x) {
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u;
  const uint32_t magnitude = bits_of(x) & 0x7fffffffu;
  // Adding 1/2 leaves a number below 2^-14 in units of 2^-24, rounded to nearest even.
  const uint32_t subnormal = bits_of(float_of(magnitude < 0x38800000u ? magnitude : 0u) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return uint16_t(sign | (magnitude >= 0x47800000u ? special : finite));
}

constexpr float kFloat16Max = 65504.0f;

template <typename Real>
constexpr DType kDTypeOf = DType::float32;
template <>
constexpr DType kDTypeOf<double> = DType::float64;

DAB_INLINE int64_t row_offset(const Operand& x, const Rows& rows, int64_t row) {
  const int64_t k = row % rows.size[2], upper = row / rows.size[2];
  return (upper / rows.size[1]) * x.stride[0] + (upper % rows.size[1]) * x.stride[1] + k * x.stride[2];
}

// Elements offset ... offset + n of x as Real: in place where the type is right already, else converted into scratch.
template <typename Real>
DAB_INLINE const Real* load(const Operand& x, int64_t offset, int64_t n, Real* scratch) {
  if (x.dtype == kDTypeOf<Real>) return static_cast<const Real*>(x.data) + offset;
  switch (x.dtype) {
    case DType::float32: {
      const float* p = static_cast<const float*>(x.data) + offset;
      for (int64_t i = 0; i < n; ++i) scratch[i] = Real(p[i]);
      break;
    }
    case DType::float16: {
      const uint16_t* p = static_cast<const uint16_t*>(x.data) + offset;
      for (int64_t i = 0; i < n; ++i) scratch[i] = Real(from_float16(p[i]));
      break;
    }
    case DType::bfloat16: {
      const uint16_t* p = static_cast<const uint16_t*>(x.data) + offset;
      for (int64_t i = 0; i < n; ++i) scratch[i] = Real(from_bfloat16(p[i]));
      break;
    }
    case DType::float64: {
      const double* p = static_cast<const double*>(x.data) + offset;
      for (int64_t i = 0; i < n; ++i) scratch[i] = Real(p[i]);
      break;
    }
  }
  return scratch;
}

// Where a row is to be computed: in x itself where the type is right, else in scratch, for store() to convert.
template <typename Real>
DAB_INLINE Real* destination(const Operand& x, int64_t offset, Real* scratch) {
  return x.dtype == kDTypeOf<Real> ? static_cast<Real*>(x.data) + offset : scratch;
}

template <typename Real>
DAB_INLINE void store(const Operand& x, int64_t offset, int64_t n, const Real* values) {
  if (x.dtype == kDTypeOf<Real> && static_cast<Real*>(x.data) + offset == values) return;
  switch (x.dtype) {
    case DType::float32: {
      float* p = static_cast<float*>(x.data) + offset;
      for (int64_t i = 0; i < n; ++i) p[i] = float(values[i]);
      break;
    }
    case DType::float16: {
      uint16_t* p = static_cast<uint16_t*>(x.data) + offset;
      for (int64_t i = 0; i < n; ++i) p[i] = to_float16(float(values[i]));
      break;
    }
    case DType::bfloat16: {
      uint16_t* p = static_cast<uint16_t*>(x.data) + offset;
      for (int64_t i = 0; i < n; ++i) p[i] = to_bfloat16(float(values[i]));
      break;
    }
    case DType::float64: {
      double* p = static_cast<double*>(x.data) + offset;
      for (int64_t i = 0; i < n; ++i) p[i] = double(values[i]);
      break;
    }
  }
}

}  // namespace DAB_ISA
}  // namespace dab_fast
