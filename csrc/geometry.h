// The geometry of anchor boxes, once: CPU loops and CUDA kernels call these lines.
//
// Sine features. Feature pair k of a coordinate c is sin and cos of 2*pi*c*w_k with w_k = temperature^(-2k/F). The angle
// is kept in turns, t = c*w_k: its integer part drops out exactly, so the result stays bounded and accurate for any c,
// no 2*pi is rounded, and no slow argument reduction exists. A quarter turn is left to a polynomial; sin and cos are
// within 1.2 ulp of the exact function of t where multiply-add is fused, else 1.7.
//
// Modulation. m = sigmoid(logit) / size, with no epsilon.
//
// Box update. y = sigmoid(delta + inverse_sigmoid(x)), where inverse_sigmoid(x) = log(max(x, eps) / max(1 - x, eps))
// for x clamped to [0, 1]; its derivative is [0 <= x <= 1] * ([x >= eps] / max(x, eps) + [1 - x >= eps] / max(1 - x, eps)),
// with < for <= and > for >= unless `bounds_pass`: torch's clamp passed the gradient at its bounds and then no longer.
//
// Real is float or double. Comparisons are written so that a NaN passes through.
#pragma once

#include <math.h>

#include "macros.h"

namespace dab_fast {
inline namespace DAB_ISA {

// 2*pi
template <typename Real>
constexpr Real kTurn = static_cast<Real>(6.283185307179586476925);

DAB_INLINE float exp_of(float x) { return ::expf(x); }
DAB_INLINE double exp_of(double x) { return ::exp(x); }
DAB_INLINE float log_of(float x) { return ::logf(x); }
DAB_INLINE double log_of(double x) { return ::log(x); }
DAB_INLINE float nearest_integer(float x) { return ::rintf(x); }
DAB_INLINE double nearest_integer(double x) { return ::rint(x); }

// sin and cos of q quarter turns, |q| <= 1/2. Minimax coefficients; truncation error below 5e-9.
DAB_INLINE void sincos_quarter(float q, float& s, float& c) {
  const float z = q * q;
  const float tail = -4.37113900e-8f + z * (-0.645963630f + z * (0.0796814128f + z * -0.00460483418f));
  s = 1.57079637f * q + tail * q;
  c = 1.0f + z * (-1.23370054f + z * (0.253669226f + z * (-0.0208601651f + z * 0.000903766543f)));
}

DAB_INLINE void sincos_quarter(double q, double& s, double& c) {
  s = ::sin(1.570796326794896619231 * q);
  c = ::cos(1.570796326794896619231 * q);
}

// sin and cos of t turns.
template <typename Real>
DAB_INLINE void sincos_turns(Real t, Real& sine, Real& cosine) {
  const Real turn = t - nearest_integer(t);              // exact, in [-1/2, 1/2]
  const Real quarter = nearest_integer(Real(4) * turn);  // -2 ... 2
  Real s, c;
  sincos_quarter(Real(4) * turn - quarter, s, c);
  const bool odd = quarter * quarter == Real(1);
  const Real half = quarter == Real(0) ? Real(1) : Real(-1);
  sine = odd ? quarter * c : half * s;
  cosine = odd ? -quarter * s : half * c;
}

// d loss / d coordinate through one pair of features with gradients d_sine and d_cosine.
template <typename Real>
DAB_INLINE Real sincos_backward(Real d_sine, Real d_cosine, Real sine, Real cosine, Real inverse_wavelength) {
  return kTurn<Real> * inverse_wavelength * (d_sine * cosine - d_cosine * sine);
}

template <typename Real>
DAB_INLINE Real sigmoid(Real x) {
  return Real(1) / (Real(1) + exp_of(-x));
}

// m = sigmoid(logit) / size
template <typename Real>
DAB_INLINE Real modulation(Real logit, Real size) {
  return sigmoid(logit) / size;
}

template <typename Real>
DAB_INLINE void modulation_backward(Real d_m, Real logit, Real size, Real& d_logit, Real& d_size) {
  const Real ratio = sigmoid(logit);
  d_logit = d_m / size * ((Real(1) - ratio) * ratio);
  d_size = -(d_m / size) * (ratio / size);  // 1 / size^2 would overflow where size is tiny and d_m is 0
}

template <typename Real>
DAB_INLINE Real at_least(Real x, Real low) {
  return x < low ? low : x;
}

template <typename Real>
DAB_INLINE Real clamp_to_unit(Real x) {
  return x < Real(0) ? Real(0) : (x > Real(1) ? Real(1) : x);
}

template <typename Real>
DAB_INLINE Real inverse_sigmoid(Real x, Real eps) {
  x = clamp_to_unit(x);
  return log_of(at_least(x, eps) / at_least(Real(1) - x, eps));
}

// Whether max(x, low) passes no gradient on to x.
template <typename Real>
DAB_INLINE bool held(Real x, Real low, bool bounds_pass) {
  return bounds_pass ? x < low : x <= low;
}

template <typename Real>
DAB_INLINE Real inverse_sigmoid_derivative(Real x, Real eps, bool bounds_pass) {
  const Real rest = Real(1) - x;
  if (held(x, Real(0), bounds_pass) || held(rest, Real(0), bounds_pass)) return Real(0);
  return (held(x, eps, bounds_pass) ? Real(0) : Real(1) / x) +
         (held(rest, eps, bounds_pass) ? Real(0) : Real(1) / rest);
}

// y = sigmoid(delta + inverse_sigmoid(x))
template <typename Real>
DAB_INLINE Real box_update(Real delta, Real x, Real eps) {
  return sigmoid(delta + inverse_sigmoid(x, eps));
}

// d loss / d delta, from the refined coordinate y; times inverse_sigmoid_derivative it is d loss / d x.
template <typename Real>
DAB_INLINE Real box_update_backward(Real d_y, Real y) {
  return d_y * ((Real(1) - y) * y);
}

}  // namespace DAB_ISA
}  // namespace dab_fast
