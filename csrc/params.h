// What a kernel is told: raw pointers, sizes, strides in elements. Shared by CPU loops and CUDA kernels.
//
// Every tensor has three leading sizes (the glue pads or flattens to three), contiguous last dimension, and its own
// leading strides; a stride of 0 broadcasts. A null pointer is an absent operand, or a gradient nobody asked for.
#pragma once

#include <cstdint>

namespace dab_fast {

enum class DType : int { float32, float16, bfloat16, float64 };
constexpr const char* kDTypeNames[] = {"float32", "float16", "bfloat16", "float64"};

struct Operand {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t stride[3] = {0, 0, 0};
};

struct Rows {
  int64_t size[3] = {1, 1, 1};
  int64_t count() const { return size[0] * size[1] * size[2]; }
};

constexpr int kMaxFeats = 512;  // features of one coordinate

// What the query's sine embedding is multiplied by.
enum class Scale : int {
  none,
  per_element,  // [..., 2F]
  per_box,      // [..., 1]
  shared,       // [2F], by all boxes
};

struct PositionEmbed {
  Rows rows;
  int coordinates = 4;  // n: 1, 2 or 4
  int num_feats = 0;    // F, even
  bool xywh = false;    // order of the features; else y, x, w, h
  Scale scale_kind = Scale::none;
  Operand boxes;       // [..., n]
  Operand scale;       // see Scale
  Operand logits;      // [..., 2]: w, h
  Operand sine;        // [..., n*F]; backward: its gradient
  Operand query_sine;  // [..., 2F] or absent; backward: its gradient
  // backward only
  bool bounds_pass = true;     // whether a clamp's gradient passes where its input is exactly a bound
  Operand d_boxes;             // [..., n]
  Operand d_scale;             // as scale
  Operand d_logits;            // [..., 2]
  void* partial = nullptr;     // [partial rows, 2F] in the computing type, for Scale::shared
};

constexpr int kBoxOutputs = 4;

struct BoxTail {
  Rows rows;
  int coordinates = 4;  // n: outputs that an old coordinate is added to
  int width = 0;        // D
  double eps = 0;
  Operand hidden;   // [..., D]
  Operand boxes;    // [..., n]
  Operand weight;   // [4, D]
  Operand bias;     // [4]
  Operand refined;  // [..., 4], float32 (float64 for float64 boxes)
  // backward only
  bool bounds_pass = true;     // whether a clamp's gradient passes where its input is exactly a bound
  Operand d_refined;           // [..., 4]
  Operand d_hidden;            // [..., D]
  Operand d_boxes;             // [..., n]
  Operand d_weight;            // [4, D]
  Operand d_bias;              // [4]
  void* partial = nullptr;     // [partial rows, 4*D + 4] in the computing type, for d_weight and d_bias
};

}  // namespace dab_fast
