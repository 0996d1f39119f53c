#pragma once

#include "narrow_float.h"

struct __half : emulation::NarrowFloat<10, -14> {};

inline float __half2float(__half x) { return x.value(); }
inline __half __float2half_rn(float x) { return {__half::of(x)}; }
