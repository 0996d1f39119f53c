// Sine embedding, scale and modulation. A group of 128 / kVec lanes owns one coordinate of one row, a lane kVec neighbouring
// features of it: 16 bytes of the results. The F/2 inverse wavelengths travel with the launch's arguments, so no table
// has to be made on the device, kept alive, or captured in a graph.
#include "../cpu/cpu.h"
#include "../geometry.h"
#include "access.cuh"
#include "cuda.h"
#include "launch.cuh"
#include "partial_sums.cuh"

namespace dab_fast {
namespace {

constexpr int kThreads = 128;
constexpr int kMostRows = 8;  // of a block
constexpr float kHalfMax = 65504.0f;
constexpr float kBelowHalfMax = 65503.99609375f;  // the next float

struct Embed {
  PositionEmbed p;
  uint32_t rows;
  float held_above;  // query sines with a larger magnitude have no gradient: float16 saturates
  float inverse_wavelength[kMaxFeats / 2];
};

__device__ __forceinline__ int coordinate_of(const PositionEmbed& p, int slot) {
  return p.xywh || slot > 1 ? slot : 1 - slot;
}

template <int kVec>
__device__ __forceinline__ void sine_features(const Embed& e, float coordinate, int feature, float (&g)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec / 2; ++i) {
    sincos_turns(coordinate * e.inverse_wavelength[feature / 2 + i], g[2 * i], g[2 * i + 1]);
  }
}

// What features feature ... feature + kVec - 1 of the center are multiplied by before the modulation.
template <int kVec, bool Vector>
__device__ __forceinline__ void load_scale(const PositionEmbed& p, int64_t offset, int place, int valid,
                                           float (&scale)[kVec]) {
  if (p.scale_kind == Scale::per_element || p.scale_kind == Scale::shared) {
    load<kVec, Vector>(scale, p.scale, offset + place, valid);
    return;
  }
  const float factor = p.scale_kind == Scale::per_box ? load_one(p.scale, offset) : 1.0f;
#pragma unroll
  for (int i = 0; i < kVec; ++i) scale[i] = factor;
}

template <int kVec, bool Vector>
__global__ void __launch_bounds__(kThreads) box_position_embed_forward(const __grid_constant__ Embed e) {
  constexpr int kLanes = kThreads / kVec;
  const PositionEmbed& p = e.p;
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int slot = group % p.coordinates;
  const uint32_t row = blockIdx.x * (kVec / p.coordinates) + group / p.coordinates;
  if (row >= e.rows) return;
  const int f = p.num_feats, c = coordinate_of(p, slot);
  const int64_t o_box = row_offset(p.boxes, p.rows, row);
  const float coordinate = load_one(p.boxes, o_box + c);
  const int64_t o_sine = row_offset(p.sine, p.rows, row), o_query = row_offset(p.query_sine, p.rows, row);
  const int64_t o_scale = row_offset(p.scale, p.rows, row);
  const bool center = slot < 2 && p.query_sine.data, saturate = p.query_sine.dtype == DType::float16;
  float m = 1.0f;
  if (center && p.logits.data) {
    m = modulation(load_one(p.logits, row_offset(p.logits, p.rows, row) + c), load_one(p.boxes, o_box + 2 + c));
  }
  for (int feature = lane * kVec; feature < f; feature += kLanes * kVec) {
    float g[kVec];
    sine_features(e, coordinate, feature, g);
    const int place = slot * f + feature, valid = f - feature;
    store<kVec, Vector>(g, p.sine, o_sine + place, valid);
    if (center) {
      float scale[kVec];
      load_scale<kVec, Vector>(p, o_scale, place, valid, scale);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        g[i] = g[i] * scale[i] * m;
        if (saturate) g[i] = g[i] > kHalfMax ? kHalfMax : (g[i] < -kHalfMax ? -kHalfMax : g[i]);
      }
      store<kVec, Vector>(g, p.query_sine, o_query + place, valid);
    }
  }
}

// p.sine and p.query_sine are the gradients of the results. SumScale: d_scale is one row for all; a block takes several rows
// and keeps its sum in shared memory, each element touched by one thread only.
template <int kVec, bool Vector, bool SumScale>
__global__ void __launch_bounds__(kThreads) box_position_embed_backward(const __grid_constant__ Embed e) {
  constexpr int kLanes = kThreads / kVec;
  extern __shared__ float d_scale_sums[];  // [rows of a block, 2F] for Scale::shared
  __shared__ float d_coordinates[kMostRows][4], d_sizes[kMostRows][2], d_scales[kMostRows][2];
  const PositionEmbed& p = e.p;
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int slot = group % p.coordinates, place_in_block = group / p.coordinates;
  const int rows_of_block = kVec / p.coordinates;
  const int f = p.num_feats, c = coordinate_of(p, slot);
  const bool center = slot < 2;
  float* sums = d_scale_sums + place_in_block * 2 * f + slot * f;
  if (SumScale && center) {
    for (int feature = lane * kVec; feature < f; feature += kLanes * kVec) {
      for (int i = 0; i < kVec && feature + i < f; ++i) sums[feature + i] = 0.0f;
    }
  }
  for (uint32_t first = blockIdx.x * rows_of_block; first < e.rows; first += gridDim.x * rows_of_block) {
    const uint32_t row = first + place_in_block;
    const bool active = row < e.rows;
    float d_coordinate = 0.0f, d_m = 0.0f, d_scale_sum = 0.0f, logit = 0.0f, size = 1.0f;
    if (active) {
      const int64_t o_box = row_offset(p.boxes, p.rows, row), o_sine = row_offset(p.sine, p.rows, row);
      const int64_t o_query = row_offset(p.query_sine, p.rows, row), o_scale = row_offset(p.scale, p.rows, row);
      const int64_t o_d_scale = row_offset(p.d_scale, p.rows, row);
      const float coordinate = load_one(p.boxes, o_box + c);
      float m = 1.0f;
      if (center && p.logits.data && p.query_sine.data) {  // 1 / size may be infinite, and 0 times that is not 0
        logit = load_one(p.logits, row_offset(p.logits, p.rows, row) + c);
        size = load_one(p.boxes, o_box + 2 + c);
        m = modulation(logit, size);
      }
      for (int feature = lane * kVec; feature < f; feature += kLanes * kVec) {
        const int place = slot * f + feature, valid = f - feature;
        float g[kVec], d_g[kVec] = {};
        sine_features(e, coordinate, feature, g);
        if (p.sine.data) load<kVec, Vector>(d_g, p.sine, o_sine + place, valid);
        if (center) {
          float scale[kVec], d_out[kVec] = {}, d_scale[kVec];
          load_scale<kVec, Vector>(p, o_scale, place, valid, scale);
          if (p.query_sine.data) load<kVec, Vector>(d_out, p.query_sine, o_query + place, valid);
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            const float scaled = g[i] * scale[i], out = scaled * m;
            const float d = fabsf(out) > e.held_above ? 0.0f : d_out[i];
            d_m += i < valid ? d * scaled : 0.0f;
            d_scale[i] = i < valid ? d * m * g[i] : 0.0f;
            d_scale_sum += d_scale[i];
            d_g[i] += d * m * scale[i];
          }
          if constexpr (SumScale) {
            for (int i = 0; i < kVec && i < valid; ++i) sums[feature + i] += d_scale[i];
          } else if (p.d_scale.data && p.scale_kind == Scale::per_element) {
            store<kVec, Vector>(d_scale, p.d_scale, o_d_scale + place, valid);
          }
        }
#pragma unroll
        for (int i = 0; i < kVec; i += 2) {
          const float d = sincos_backward(d_g[i], d_g[i + 1], g[i], g[i + 1], e.inverse_wavelength[(feature + i) / 2]);
          d_coordinate += i < valid ? d : 0.0f;
        }
      }
    }
    d_coordinate = sum_over_lanes<kLanes>(d_coordinate);
    d_m = sum_over_lanes<kLanes>(d_m);
    d_scale_sum = sum_over_lanes<kLanes>(d_scale_sum);
    const bool writes = active && lane == 0;
    if (writes) {
      d_coordinates[place_in_block][slot] = d_coordinate;
      if (center) {
        float d_logit = 0.0f, d_size = 0.0f;
        if (p.logits.data) modulation_backward(d_m, logit, size, d_logit, d_size);
        d_sizes[place_in_block][c] = d_size;
        d_scales[place_in_block][slot] = d_scale_sum;
        if (p.d_logits.data) store_one(d_logit, p.d_logits, row_offset(p.d_logits, p.rows, row) + c);
      }
    }
    __syncthreads();
    if (writes) {
      if (p.d_boxes.data) {
        const float d = d_coordinates[place_in_block][slot] + (c > 1 ? d_sizes[place_in_block][c - 2] : 0.0f);
        store_one(d, p.d_boxes, row_offset(p.d_boxes, p.rows, row) + c);
      }
      if (slot == 0 && p.d_scale.data && p.scale_kind == Scale::per_box) {
        store_one(d_scales[place_in_block][0] + d_scales[place_in_block][1], p.d_scale,
                  row_offset(p.d_scale, p.rows, row));
      }
    }
    __syncthreads();
  }
  if (SumScale && center) {
    float* out = static_cast<float*>(p.partial) + (int64_t(blockIdx.x) * rows_of_block + place_in_block) * 2 * f + slot * f;
    for (int feature = lane * kVec; feature < f; feature += kLanes * kVec) {
      for (int i = 0; i < kVec && feature + i < f; ++i) out[feature + i] = sums[feature + i];
    }
  }
}

Embed embed_of(const PositionEmbed& p, double temperature) {
  Embed e;
  e.p = p;
  e.rows = uint32_t(p.rows.count());
  e.held_above = p.query_sine.dtype != DType::float16 ? INFINITY : p.bounds_pass ? kHalfMax : kBelowHalfMax;
  double wavelengths[kMaxFeats / 2];
  inverse_wavelengths(p.num_feats, temperature, wavelengths);
  for (int k = 0; k < kMaxFeats / 2; ++k) e.inverse_wavelength[k] = k < p.num_feats / 2 ? float(wavelengths[k]) : 0.0f;
  return e;
}

bool vectorizes(const PositionEmbed& p, int vec) {
  const bool per_feature = p.scale_kind == Scale::per_element || p.scale_kind == Scale::shared;
  return p.num_feats % vec == 0 && aligned(p.sine, vec) && aligned(p.query_sine, vec) &&
         (!per_feature || aligned(p.scale, vec)) && (p.scale_kind != Scale::per_element || aligned(p.d_scale, vec));
}

int vector_of(const PositionEmbed& p) {
  const Operand& wide = p.sine.data ? p.sine : p.query_sine;
  return wide.dtype == DType::float32 ? 4 : 8;
}

// With SumScale 4 features a lane in every dtype: 8 would spill registers on sm_80.
auto backward_kernel(const PositionEmbed& p, int vec, bool sum_scale) {
  const bool vector = vectorizes(p, vec);
  if (sum_scale) {
    return vector ? box_position_embed_backward<4, true, true> : box_position_embed_backward<4, false, true>;
  }
  if (vec == 4) {
    return vector ? box_position_embed_backward<4, true, false> : box_position_embed_backward<4, false, false>;
  }
  return vector ? box_position_embed_backward<8, true, false> : box_position_embed_backward<8, false, false>;
}

}  // namespace

void cuda_box_position_embed(const PositionEmbed& p, double temperature, int device, void* stream) {
  const Embed e = embed_of(p, temperature);
  if (!e.rows) return;
  const DeviceGuard guard(device);
  const int vec = vector_of(p);
  const auto kernel = vec == 4 ? (vectorizes(p, 4) ? box_position_embed_forward<4, true> : box_position_embed_forward<4, false>)
                               : (vectorizes(p, 8) ? box_position_embed_forward<8, true> : box_position_embed_forward<8, false>);
  const uint32_t rows_of_block = vec / p.coordinates;
  launch("box_position_embed_forward", kernel, dim3((e.rows + rows_of_block - 1) / rows_of_block), dim3(kThreads), 0,
         device, stream, e);
}

void cuda_box_position_embed_backward(const PositionEmbed& p, double temperature, int device, void* stream) {
  const Embed e = embed_of(p, temperature);
  if (!e.rows) return;
  const DeviceGuard guard(device);
  const bool sum_scale = p.scale_kind == Scale::shared && p.d_scale.data;
  const int vec = sum_scale ? 4 : vector_of(p);
  const uint32_t rows_of_block = vec / p.coordinates;
  const auto kernel = backward_kernel(p, vec, sum_scale);
  const int64_t partial_rows = cuda_partial_rows(e.rows);
  const uint32_t blocks =
      sum_scale ? uint32_t(partial_rows) / rows_of_block : (e.rows + rows_of_block - 1) / rows_of_block;
  const size_t shared = sum_scale ? sizeof(float) * rows_of_block * 2 * p.num_feats : 0;
  launch("box_position_embed_backward", kernel, dim3(blocks), dim3(kThreads), shared, device, stream, e);
  if (sum_scale) {
    sum_partials(p.partial, partial_rows, 2 * p.num_feats, 0, 2 * p.num_feats, p.d_scale,
                 "box_position_embed_backward (d_scale)", device, stream);
  }
}

}  // namespace dab_fast
