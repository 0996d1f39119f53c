#pragma once

#include "narrow_float.h"

struct __nv_bfloat16 : emulation::NarrowFloat<7, -126> {};

inline float __bfloat162float(__nv_bfloat16 x) { return x.value(); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {__nv_bfloat16::of(x)}; }
