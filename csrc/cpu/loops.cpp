#include "loops.h"

#include "../geometry.h"
#include "scalar.h"

namespace dab_fast {
inline namespace DAB_ISA {
namespace {

// Coordinate whose features come at place `slot`, and the entry of `logits` and of the sizes that modulates it.
inline int coordinate_of(const PositionEmbed& p, int slot) { return p.xywh || slot > 1 ? slot : 1 - slot; }

template <typename Real>
void sine_row(const PositionEmbed& p, const Real* box, const Real* wavelength, Real* out) {
  const int pairs = p.num_feats / 2;
  for (int slot = 0; slot < p.coordinates; ++slot) {
    const Real coordinate = box[coordinate_of(p, slot)];
    Real* features = out + int64_t(slot) * p.num_feats;
    for (int k = 0; k < pairs; ++k) {
      Real s, c;
      sincos_turns(coordinate * wavelength[k], s, c);
      features[2 * k] = s;
      features[2 * k + 1] = c;
    }
  }
}

template <typename Real>
void convert_wavelengths(const PositionEmbed& p, const double* from, Real* to) {
  for (int k = 0; k < p.num_feats / 2; ++k) to[k] = Real(from[k]);
}

template <typename Real>
struct EmbedScratch {
  Real wavelength[kMaxFeats / 2];
  Real box[4];
  Real logits[2];
  Real scale[2 * kMaxFeats];
  Real sine[4 * kMaxFeats];
  Real query[2 * kMaxFeats];
};

// The 2F numbers that the center features of a row are multiplied by before the modulation; `filled` is Scale::none's.
template <typename Real>
const Real* scale_row(const PositionEmbed& p, int64_t row, const Real* filled, Real* scratch) {
  const int width = 2 * p.num_feats;
  if (p.scale_kind == Scale::none) return filled;
  const int64_t offset = row_offset(p.scale, p.rows, row);
  if (p.scale_kind != Scale::per_box) return load(p.scale, offset, width, scratch);
  Real one = 0;
  const Real factor = *load(p.scale, offset, 1, &one);
  for (int i = 0; i < width; ++i) scratch[i] = factor;
  return scratch;
}

inline float absolute(float x) { return ::fabsf(x); }
inline double absolute(double x) { return ::fabs(x); }

template <typename Real>
void fill_ones(const PositionEmbed& p, Real* out) {
  for (int i = 0; i < 2 * p.num_feats; ++i) out[i] = Real(1);
}

// Beyond this a result saturates.
template <typename Real>
Real largest(const Operand& result) {
  return result.data && result.dtype == DType::float16 ? Real(kFloat16Max) : Real(HUGE_VAL);
}

template <typename Real>
void position_embed_as(const PositionEmbed& p, const double* inverse_wavelength, int64_t begin, int64_t end) {
  EmbedScratch<Real> scratch;
  convert_wavelengths(p, inverse_wavelength, scratch.wavelength);
  const int f = p.num_feats;
  Real ones[2 * kMaxFeats];
  fill_ones(p, ones);
  const Real limit = largest<Real>(p.query_sine);
  for (int64_t row = begin; row < end; ++row) {
    const Real* box = load(p.boxes, row_offset(p.boxes, p.rows, row), p.coordinates, scratch.box);
    const int64_t o_sine = row_offset(p.sine, p.rows, row), o_query = row_offset(p.query_sine, p.rows, row);
    Real* sine = destination(p.sine, o_sine, scratch.sine);
    sine_row(p, box, scratch.wavelength, sine);
    store(p.sine, o_sine, int64_t(p.coordinates) * f, sine);
    if (!p.query_sine.data) continue;
    Real* query = destination(p.query_sine, o_query, scratch.query);

    const Real* scale = scale_row(p, row, ones, scratch.scale);
    const Real* logits = nullptr;
    if (p.logits.data) logits = load(p.logits, row_offset(p.logits, p.rows, row), 2, scratch.logits);
    for (int slot = 0; slot < 2; ++slot) {
      const int c = coordinate_of(p, slot);
      const Real m = logits ? modulation(logits[c], box[2 + c]) : Real(1);
#pragma omp simd
      for (int i = slot * f; i < (slot + 1) * f; ++i) {
        const Real out = sine[i] * scale[i] * m;
        query[i] = out > limit ? limit : (out < -limit ? -limit : out);
      }
    }
    store(p.query_sine, o_query, 2 * f, query);
  }
}

void position_embed(const PositionEmbed& p, const double* inverse_wavelength, int64_t begin, int64_t end) {
  if (p.boxes.dtype == DType::float64) {
    position_embed_as<double>(p, inverse_wavelength, begin, end);
  } else {
    position_embed_as<float>(p, inverse_wavelength, begin, end);
  }
}

template <typename Real>
void position_embed_backward_as(const PositionEmbed& p, const double* inverse_wavelength, int64_t chunk) {
  EmbedScratch<Real> scratch;
  convert_wavelengths(p, inverse_wavelength, scratch.wavelength);
  Real d_sine_scratch[4 * kMaxFeats], d_query_scratch[2 * kMaxFeats], d_scale_scratch[2 * kMaxFeats];
  Real d_feature[kMaxFeats];
  const int f = p.num_feats;
  Real ones[2 * kMaxFeats];
  fill_ones(p, ones);
  const bool saturates = p.query_sine.data && p.query_sine.dtype == DType::float16;
  const int64_t begin = chunk * kChunkRows;
  const int64_t end = begin + kChunkRows < p.rows.count() ? begin + kChunkRows : p.rows.count();
  Real* d_scale_row = nullptr;
  if (p.d_scale.data && p.scale_kind == Scale::shared) {
    d_scale_row = static_cast<Real*>(p.partial) + chunk * 2 * f;
    for (int i = 0; i < 2 * f; ++i) d_scale_row[i] = Real(0);
  }
  for (int64_t row = begin; row < end; ++row) {
    const Real* box = load(p.boxes, row_offset(p.boxes, p.rows, row), p.coordinates, scratch.box);
    const Real* sine = scratch.sine;
    sine_row(p, box, scratch.wavelength, scratch.sine);
    const Real* d_sine = nullptr;
    if (p.sine.data) {
      d_sine = load(p.sine, row_offset(p.sine, p.rows, row), int64_t(p.coordinates) * f, d_sine_scratch);
    }
    const Real* d_query = nullptr;
    if (p.query_sine.data) d_query = load(p.query_sine, row_offset(p.query_sine, p.rows, row), 2 * f, d_query_scratch);
    const Real* scale = scale_row(p, row, ones, scratch.scale);
    const Real* logits = nullptr;
    if (p.logits.data) logits = load(p.logits, row_offset(p.logits, p.rows, row), 2, scratch.logits);

    Real d_box[4] = {0, 0, 0, 0}, d_logits[2] = {0, 0};
    double d_scale_sum = 0;  // sums of a row are double, so that their error depends on no vector width
    for (int slot = 0; slot < p.coordinates; ++slot) {
      const int c = coordinate_of(p, slot);
      const Real* features = sine + int64_t(slot) * f;
      for (int i = 0; i < f; ++i) d_feature[i] = d_sine ? d_sine[int64_t(slot) * f + i] : Real(0);
      if (slot < 2 && d_query) {
        const Real m = logits ? modulation(logits[c], box[2 + c]) : Real(1);
        const Real *d_out = d_query + slot * f, *factors = scale + slot * f;
        Real* d_scale = d_scale_scratch + slot * f;
        double d_m = 0, d_sum = 0;
#pragma omp simd reduction(+ : d_m, d_sum)
        for (int i = 0; i < f; ++i) {
          const Real d_given = d_out[i], scaled = features[i] * factors[i], magnitude = absolute(scaled * m);
          const bool constant = saturates && held(-magnitude, Real(-kFloat16Max), p.bounds_pass);
          const Real d = constant ? Real(0) : d_given;
          d_m += d * scaled;
          d_scale[i] = d * m * features[i];
          d_sum += d_scale[i];
          d_feature[i] += d * m * factors[i];
        }
        d_scale_sum += d_sum;
        if (logits) {
          Real d_size;
          modulation_backward(Real(d_m), logits[c], box[2 + c], d_logits[c], d_size);
          d_box[2 + c] += d_size;
        }
      }
      double d_coordinate = 0;
#pragma omp simd reduction(+ : d_coordinate)
      for (int k = 0; k < f / 2; ++k) {
        d_coordinate += sincos_backward(d_feature[2 * k], d_feature[2 * k + 1], features[2 * k], features[2 * k + 1],
                                        scratch.wavelength[k]);
      }
      d_box[c] += Real(d_coordinate);
    }

    if (p.d_boxes.data) store(p.d_boxes, row_offset(p.d_boxes, p.rows, row), p.coordinates, d_box);
    if (p.d_logits.data) store(p.d_logits, row_offset(p.d_logits, p.rows, row), 2, d_logits);
    if (p.d_scale.data) {
      if (!d_query) {
        for (int i = 0; i < 2 * f; ++i) d_scale_scratch[i] = Real(0);
      }
      if (d_scale_row) {
        for (int i = 0; i < 2 * f; ++i) d_scale_row[i] += d_scale_scratch[i];
      } else if (p.scale_kind == Scale::per_box) {
        const Real d_one = Real(d_scale_sum);
        store(p.d_scale, row_offset(p.d_scale, p.rows, row), 1, &d_one);
      } else {
        store(p.d_scale, row_offset(p.d_scale, p.rows, row), 2 * f, d_scale_scratch);
      }
    }
  }
}

void position_embed_backward(const PositionEmbed& p, const double* inverse_wavelength, int64_t chunk) {
  if (p.boxes.dtype == DType::float64) {
    position_embed_backward_as<double>(p, inverse_wavelength, chunk);
  } else {
    position_embed_backward_as<float>(p, inverse_wavelength, chunk);
  }
}

// Rows of `hidden` and `weight` longer than this are converted piece by piece.
constexpr int kPiece = 512;

template <typename Real>
void box_tail_as(const BoxTail& p, int64_t begin, int64_t end) {
  Real hidden_scratch[kPiece], weight_scratch[kBoxOutputs][kPiece], bias_scratch[kBoxOutputs], box_scratch[4];
  Real out_scratch[kBoxOutputs];
  const Real* bias = load(p.bias, 0, kBoxOutputs, bias_scratch);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t o_hidden = row_offset(p.hidden, p.rows, row);
    double sum0 = bias[0], sum1 = bias[1], sum2 = bias[2], sum3 = bias[3];
    for (int start = 0; start < p.width; start += kPiece) {
      const int n = p.width - start < kPiece ? p.width - start : kPiece;
      const Real* hidden = load(p.hidden, o_hidden + start, n, hidden_scratch);
      const Real* w[kBoxOutputs];
      for (int j = 0; j < kBoxOutputs; ++j) {
        w[j] = load(p.weight, j * p.weight.stride[2] + start, n, weight_scratch[j]);
      }
      const Real *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3];
#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
      for (int i = 0; i < n; ++i) {
        sum0 += hidden[i] * w0[i];
        sum1 += hidden[i] * w1[i];
        sum2 += hidden[i] * w2[i];
        sum3 += hidden[i] * w3[i];
      }
    }
    const Real logits[kBoxOutputs] = {Real(sum0), Real(sum1), Real(sum2), Real(sum3)};
    const Real* box = load(p.boxes, row_offset(p.boxes, p.rows, row), p.coordinates, box_scratch);
    const int64_t o_refined = row_offset(p.refined, p.rows, row);
    Real* out = destination(p.refined, o_refined, out_scratch);
    for (int j = 0; j < kBoxOutputs; ++j) {
      out[j] = j < p.coordinates ? box_update(logits[j], box[j], Real(p.eps)) : sigmoid(logits[j]);
    }
    store(p.refined, o_refined, kBoxOutputs, out);
  }
}

void box_tail(const BoxTail& p, int64_t begin, int64_t end) {
  if (p.refined.dtype == DType::float64) {
    box_tail_as<double>(p, begin, end);
  } else {
    box_tail_as<float>(p, begin, end);
  }
}

template <typename Real>
void box_tail_backward_as(const BoxTail& p, int64_t chunk) {
  Real hidden_scratch[kPiece], weight_scratch[kBoxOutputs][kPiece], d_hidden_scratch[kPiece];
  Real box_scratch[4], refined_scratch[4], d_refined_scratch[4], d_box[4];
  const int64_t begin = chunk * kChunkRows;
  const int64_t end = begin + kChunkRows < p.rows.count() ? begin + kChunkRows : p.rows.count();
  const bool parameters = p.d_weight.data || p.d_bias.data;
  Real* d_weight = nullptr;  // [4, D], then d_bias [4]
  if (parameters) {
    d_weight = static_cast<Real*>(p.partial) + chunk * kBoxOutputs * (int64_t(p.width) + 1);
    for (int64_t i = 0; i < kBoxOutputs * (int64_t(p.width) + 1); ++i) d_weight[i] = Real(0);
  }
  for (int64_t row = begin; row < end; ++row) {
    const Real* refined = load(p.refined, row_offset(p.refined, p.rows, row), kBoxOutputs, refined_scratch);
    const Real* d_refined = load(p.d_refined, row_offset(p.d_refined, p.rows, row), kBoxOutputs, d_refined_scratch);
    Real d_logits[kBoxOutputs];
    for (int j = 0; j < kBoxOutputs; ++j) d_logits[j] = box_update_backward(d_refined[j], refined[j]);
    if (p.d_boxes.data) {
      const Real* box = load(p.boxes, row_offset(p.boxes, p.rows, row), p.coordinates, box_scratch);
      for (int j = 0; j < p.coordinates; ++j) {
        d_box[j] = d_logits[j] * inverse_sigmoid_derivative(box[j], Real(p.eps), p.bounds_pass);
      }
      store(p.d_boxes, row_offset(p.d_boxes, p.rows, row), p.coordinates, d_box);
    }
    const Real d0 = d_logits[0], d1 = d_logits[1], d2 = d_logits[2], d3 = d_logits[3];
    for (int start = 0; start < p.width && p.d_hidden.data; start += kPiece) {
      const int n = p.width - start < kPiece ? p.width - start : kPiece;
      const Real* w[kBoxOutputs];
      for (int j = 0; j < kBoxOutputs; ++j) {
        w[j] = load(p.weight, j * p.weight.stride[2] + start, n, weight_scratch[j]);
      }
      const Real *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3];
      const int64_t offset = row_offset(p.d_hidden, p.rows, row) + start;
      Real* d_hidden = destination(p.d_hidden, offset, d_hidden_scratch);
#pragma omp simd
      for (int i = 0; i < n; ++i) d_hidden[i] = (d0 * w0[i] + d1 * w1[i]) + (d2 * w2[i] + d3 * w3[i]);
      store(p.d_hidden, offset, n, d_hidden);
    }
    for (int start = 0; start < p.width && p.d_weight.data; start += kPiece) {
      const int n = p.width - start < kPiece ? p.width - start : kPiece;
      const Real* hidden = load(p.hidden, row_offset(p.hidden, p.rows, row) + start, n, hidden_scratch);
      for (int j = 0; j < kBoxOutputs; ++j) {
        Real* out = d_weight + int64_t(j) * p.width + start;
        const Real d = d_logits[j];
#pragma omp simd
        for (int i = 0; i < n; ++i) out[i] += d * hidden[i];
      }
    }
    if (parameters) {
      for (int j = 0; j < kBoxOutputs; ++j) d_weight[int64_t(kBoxOutputs) * p.width + j] += d_logits[j];
    }
  }
}

void box_tail_backward(const BoxTail& p, int64_t chunk) {
  if (p.refined.dtype == DType::float64) {
    box_tail_backward_as<double>(p, chunk);
  } else {
    box_tail_backward_as<float>(p, chunk);
  }
}

}  // namespace
}  // namespace DAB_ISA

#define DAB_TEXT_(x) #x
#define DAB_TEXT(x) DAB_TEXT_(x)
#define DAB_JOIN_(a, b) a##b
#define DAB_JOIN(a, b) DAB_JOIN_(a, b)

const Loops& DAB_JOIN(loops_, DAB_ISA)() {
  static const Loops loops = {DAB_TEXT(DAB_ISA), position_embed, position_embed_backward, box_tail, box_tail_backward};
  return loops;
}

}  // namespace dab_fast
