"""Scalar functions shared by the kernels, in fp32 and good to about one unit in the last place.

Triton's `exp` and `sin` either trade accuracy for one instruction (`ex2.approx`) or bring a slow path that needs stack
memory; the geometry of a box is worth a dozen multiply-adds. Nothing here needs inline assembly or libdevice, so the
interpreter runs the same lines as a GPU.
"""

import triton
import triton.language as tl


@triton.jit
def exp(x):
    """e^x = 2^k · e^r with r = x - k ln 2 (ln 2 in two parts), |r| <= ln 2 / 2, and a polynomial for e^r."""
    x = tl.where(x < -87.0, -87.0, tl.where(x > 88.0, 88.0, x))
    k = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - k * 0.693359375) + k * 2.12194440e-4
    p = 1.9841270e-4 * r + 1.3888889e-3
    p = p * r + 8.3333333e-3
    p = p * r + 4.1666667e-2
    p = p * r + 1.6666667e-1
    p = p * r + 0.5
    p = (p * r + 1.0) * r + 1.0
    return p * ((k.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def log(x):
    """ln x of a normal x > 0, or NaN: x = 2^k · m with m in [√½, √2), and a polynomial for ln m."""
    i = x.to(tl.int32, bitcast=True)
    k = (i - 0x3F3504F3) >> 23
    f = (i - (k << 23)).to(tl.float32, bitcast=True) - 1.0
    k = k.to(tl.float32)
    p = 7.0376836e-2 * f - 1.1514610e-1
    p = p * f + 1.1676998e-1
    p = p * f - 1.2420141e-1
    p = p * f + 1.4249323e-1
    p = p * f - 1.6668058e-1
    p = p * f + 2.0000715e-1
    p = p * f - 2.4999994e-1
    p = p * f + 3.3333331e-1
    p = f + ((f * f) * (f * p - 0.5) - 2.12194440e-4 * k)
    return tl.where(x != x, x, p + 0.693359375 * k)


@triton.jit
def held(x, LOW: tl.constexpr, BOUNDS_PASS: tl.constexpr):
    """Where max(x, LOW) passes no gradient on to x: `precision.clamp_passes_at_bounds` says whether LOW itself does."""
    if BOUNDS_PASS:
        return x < LOW
    else:
        return x <= LOW


@triton.jit
def sigmoid(x):
    return tl.div_rn(1.0, 1.0 + exp(-x))


@triton.jit
def sin_cos_turns(u):
    """(sin 2πu, cos 2πu) for |u| < 2^20: u less its nearest quarter turn q/4 is exact, so no digits are lost.

    Adding 1.5 · 2^23 rounds 4u to an integer and leaves q mod 4 in the last two bits.
    """
    m = 4.0 * u + 12582912.0
    q = m.to(tl.int32, bitcast=True)
    r = u - 0.25 * (m - 12582912.0)
    z = r * r
    s = (((-75.40184020996094 * z + 81.59254455566406) * z - 41.3416633605957) * z + 6.2831854820251465) * r
    c = (((59.42422103881836 * z - 85.44882202148438) * z + 64.93936920166016) * z - 19.739208221435547) * z + 1.0
    swap = (q & 1) != 0
    sin = tl.where(swap, c, s)
    cos = tl.where(swap, s, c)
    return tl.where((q & 2) != 0, -sin, sin), tl.where(((q + 1) & 2) != 0, -cos, cos)
