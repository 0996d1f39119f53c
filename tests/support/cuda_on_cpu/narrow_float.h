// Conversions between float32 and a 16-bit float, correctly rounded (ties to even); written from the definition of the
// format and nothing else, since csrc/cpu/scalar.h is among what is tested.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace emulation {

// kMantissa bits after the point; the smallest normal number is 2^kLeast.
template <int kMantissa, int kLeast>
struct NarrowFloat {
  uint16_t bits;

  static constexpr uint16_t kSign = 0x8000, kInfinity = (3 - 2 * kLeast) << kMantissa;

  static NarrowFloat of(float x) {
    const uint16_t sign = std::signbit(x) ? kSign : 0;
    if (std::isnan(x)) return {uint16_t(sign | kInfinity | 1)};
    if (std::isinf(x)) return {uint16_t(sign | kInfinity)};
    const int exponent = x == 0 ? kLeast : std::max(std::ilogb(x), kLeast);
    const double units = std::nearbyint(std::ldexp(std::fabs(double(x)), kMantissa - exponent));
    const double all = units + std::ldexp(exponent - kLeast, kMantissa);  // a carry goes on into the exponent
    return {uint16_t(sign | uint16_t(std::min<double>(all, kInfinity)))};
  }

  float value() const {
    const int magnitude = bits & ~kSign, exponent = magnitude >> kMantissa;
    const int mantissa = magnitude & ((1 << kMantissa) - 1);
    double x;
    if (magnitude >= kInfinity) {
      x = mantissa ? NAN : INFINITY;
    } else if (exponent == 0) {
      x = std::ldexp(mantissa, kLeast - kMantissa);
    } else {
      x = std::ldexp(mantissa + (1 << kMantissa), exponent - 1 + kLeast - kMantissa);
    }
    return float(bits & kSign ? -x : x);
  }
};

}  // namespace emulation
