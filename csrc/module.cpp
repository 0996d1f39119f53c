// dab_fast._C: the kernels, called with addresses, sizes and strides. No torch header: dab_fast/native/ reads tensors
// and makes the results.
#include <pybind11/pybind11.h>

#include <string>

#include "build_config.h"
#include "cpu/cpu.h"
#include "params.h"
#if defined(DAB_CUDA)
#include "cuda/cuda.h"
#endif

namespace py = pybind11;

namespace {

int64_t integer_at(PyObject* tuple, Py_ssize_t i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i)); }

bool is_tuple_of(PyObject* object, Py_ssize_t size) { return PyTuple_Check(object) && PyTuple_GET_SIZE(object) == size; }

}  // namespace

namespace pybind11::detail {

// None, or (address, dtype, stride, stride, stride)
template <>
struct type_caster<dab_fast::Operand> {
  PYBIND11_TYPE_CASTER(dab_fast::Operand, const_name("tuple[int, int, int, int, int] | None"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    PyObject* tuple = source.ptr();
    if (!is_tuple_of(tuple, 5)) return false;
    value.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(tuple, 0));
    const int64_t dtype = integer_at(tuple, 1);
    for (int i = 0; i < 3; ++i) value.stride[i] = integer_at(tuple, 2 + i);
    if (PyErr_Occurred()) throw error_already_set();
    if (dtype < 0 || dtype > 3) throw value_error("dtype must be an index into DTYPES, got " + std::to_string(dtype));
    value.dtype = static_cast<dab_fast::DType>(dtype);
    return true;
  }
};

// (size, size, size)
template <>
struct type_caster<dab_fast::Rows> {
  PYBIND11_TYPE_CASTER(dab_fast::Rows, const_name("tuple[int, int, int]"));

  bool load(handle source, bool) {
    if (!is_tuple_of(source.ptr(), 3)) return false;
    for (int i = 0; i < 3; ++i) value.size[i] = integer_at(source.ptr(), i);
    if (PyErr_Occurred()) throw error_already_set();
    return true;
  }
};

}  // namespace pybind11::detail

namespace {

using dab_fast::BoxTail;
using dab_fast::Operand;
using dab_fast::PositionEmbed;
using dab_fast::Rows;
using dab_fast::Scale;

PositionEmbed position_embed(const Rows& rows, int coordinates, int num_feats, bool xywh, int scale_kind,
                             const Operand& boxes, const Operand& scale, const Operand& logits, const Operand& sine,
                             const Operand& query_sine) {
  if (num_feats < 2 || num_feats % 2 || num_feats > dab_fast::kMaxFeats) {
    throw py::value_error("num_feats must be even, from 2 to " + std::to_string(dab_fast::kMaxFeats) + ", got " +
                          std::to_string(num_feats));
  }
  if (coordinates != 1 && coordinates != 2 && coordinates != 4) {
    throw py::value_error("boxes must have 1, 2 or 4 coordinates, got " + std::to_string(coordinates));
  }
  if (query_sine.data && coordinates < 2) throw py::value_error("the query's embedding needs 2 or 4 coordinates");
  if (logits.data && coordinates != 4) throw py::value_error("the modulation needs 4 coordinates");
  PositionEmbed p;
  p.rows = rows;
  p.coordinates = coordinates;
  p.num_feats = num_feats;
  p.xywh = xywh;
  p.scale_kind = scale.data ? static_cast<Scale>(scale_kind) : Scale::none;
  p.boxes = boxes;
  p.scale = scale;
  p.logits = logits;
  p.sine = sine;
  p.query_sine = query_sine;
  return p;
}

BoxTail box_tail(const Rows& rows, int coordinates, int width, double eps, const Operand& hidden, const Operand& boxes,
                 const Operand& weight, const Operand& bias, const Operand& refined) {
  if (coordinates != 2 && coordinates != 4) throw py::value_error("boxes must have 2 or 4 coordinates, got " + std::to_string(coordinates));
  BoxTail p;
  p.rows = rows;
  p.coordinates = coordinates;
  p.width = width;
  p.eps = eps;
  p.hidden = hidden;
  p.boxes = boxes;
  p.weight = weight;
  p.bias = bias;
  p.refined = refined;
  return p;
}

void* address(int64_t x) { return reinterpret_cast<void*>(static_cast<uintptr_t>(x)); }

void bind_cpu(py::module_& m) {
  m.def("cpu_isa", &dab_fast::cpu_isa);
  m.def("cpu_box_position_embed",
        [](const Rows& rows, int coordinates, int num_feats, double temperature, bool xywh, int scale_kind,
           const Operand& boxes, const Operand& scale, const Operand& logits, const Operand& sine,
           const Operand& query_sine, int threads) {
          const PositionEmbed p = position_embed(rows, coordinates, num_feats, xywh, scale_kind, boxes, scale, logits,
                                                 sine, query_sine);
          py::gil_scoped_release released;
          dab_fast::cpu_box_position_embed(p, temperature, threads);
        });
  m.def("cpu_box_position_embed_backward",
        [](const Rows& rows, int coordinates, int num_feats, double temperature, bool xywh, int scale_kind,
           bool bounds_pass, const Operand& boxes, const Operand& scale, const Operand& logits, const Operand& d_sine,
           const Operand& d_query_sine, const Operand& d_boxes, const Operand& d_scale, const Operand& d_logits,
           int threads) {
          PositionEmbed p = position_embed(rows, coordinates, num_feats, xywh, scale_kind, boxes, scale, logits, d_sine,
                                           d_query_sine);
          p.bounds_pass = bounds_pass;
          p.d_boxes = d_boxes;
          p.d_scale = d_scale;
          p.d_logits = d_logits;
          py::gil_scoped_release released;
          dab_fast::cpu_box_position_embed_backward(p, temperature, threads);
        });
  m.def("cpu_box_tail", [](const Rows& rows, int coordinates, int width, double eps, const Operand& hidden,
                           const Operand& boxes, const Operand& weight, const Operand& bias, const Operand& refined,
                           int threads) {
    const BoxTail p = box_tail(rows, coordinates, width, eps, hidden, boxes, weight, bias, refined);
    py::gil_scoped_release released;
    dab_fast::cpu_box_tail(p, threads);
  });
  m.def("cpu_box_tail_backward",
        [](const Rows& rows, int coordinates, int width, double eps, bool bounds_pass, const Operand& hidden,
           const Operand& boxes, const Operand& weight, const Operand& bias, const Operand& refined,
           const Operand& d_refined, const Operand& d_hidden, const Operand& d_boxes, const Operand& d_weight,
           const Operand& d_bias, int threads) {
          BoxTail p = box_tail(rows, coordinates, width, eps, hidden, boxes, weight, bias, refined);
          p.bounds_pass = bounds_pass;
          p.d_refined = d_refined;
          p.d_hidden = d_hidden;
          p.d_boxes = d_boxes;
          p.d_weight = d_weight;
          p.d_bias = d_bias;
          py::gil_scoped_release released;
          dab_fast::cpu_box_tail_backward(p, threads);
        });
}

#if defined(DAB_CUDA)
// Launching returns before the kernel has run, so the GIL is kept. `stream` is torch's current stream on `device`.
void bind_cuda(py::module_& m) {
  m.def("cuda_runtime_version", &dab_fast::cuda_runtime_version);
  m.def("cuda_devices", &dab_fast::cuda_devices);
  m.def("cuda_partial_rows", &dab_fast::cuda_partial_rows);
  m.def("cuda_box_position_embed",
        [](const Rows& rows, int coordinates, int num_feats, double temperature, bool xywh, int scale_kind,
           const Operand& boxes, const Operand& scale, const Operand& logits, const Operand& sine,
           const Operand& query_sine, int device, int64_t stream) {
          const PositionEmbed p = position_embed(rows, coordinates, num_feats, xywh, scale_kind, boxes, scale, logits,
                                                 sine, query_sine);
          dab_fast::cuda_box_position_embed(p, temperature, device, address(stream));
        });
  m.def("cuda_box_position_embed_backward",
        [](const Rows& rows, int coordinates, int num_feats, double temperature, bool xywh, int scale_kind,
           bool bounds_pass, const Operand& boxes, const Operand& scale, const Operand& logits, const Operand& d_sine,
           const Operand& d_query_sine, const Operand& d_boxes, const Operand& d_scale, const Operand& d_logits,
           int64_t partial, int device, int64_t stream) {
          PositionEmbed p = position_embed(rows, coordinates, num_feats, xywh, scale_kind, boxes, scale, logits, d_sine,
                                           d_query_sine);
          p.bounds_pass = bounds_pass;
          p.d_boxes = d_boxes;
          p.d_scale = d_scale;
          p.d_logits = d_logits;
          p.partial = address(partial);
          dab_fast::cuda_box_position_embed_backward(p, temperature, device, address(stream));
        });
  m.def("cuda_box_tail", [](const Rows& rows, int coordinates, int width, double eps, const Operand& hidden,
                            const Operand& boxes, const Operand& weight, const Operand& bias, const Operand& refined,
                            int device, int64_t stream) {
    const BoxTail p = box_tail(rows, coordinates, width, eps, hidden, boxes, weight, bias, refined);
    dab_fast::cuda_box_tail(p, device, address(stream));
  });
  m.def("cuda_box_tail_backward",
        [](const Rows& rows, int coordinates, int width, double eps, bool bounds_pass, const Operand& hidden,
           const Operand& boxes, const Operand& weight, const Operand& bias, const Operand& refined,
           const Operand& d_refined, const Operand& d_hidden, const Operand& d_boxes, const Operand& d_weight,
           const Operand& d_bias, int64_t partial, int device, int64_t stream) {
          BoxTail p = box_tail(rows, coordinates, width, eps, hidden, boxes, weight, bias, refined);
          p.bounds_pass = bounds_pass;
          p.d_refined = d_refined;
          p.d_hidden = d_hidden;
          p.d_boxes = d_boxes;
          p.d_weight = d_weight;
          p.d_bias = d_bias;
          p.partial = address(partial);
          dab_fast::cuda_box_tail_backward(p, device, address(stream));
        });
}
#endif

}  // namespace

// No global is written after the first call and none is shared between calls, so the module needs no GIL.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.attr("VERSION") = DAB_VERSION;
  m.attr("SOURCES") = DAB_SOURCES;
  m.attr("COMPILER") = DAB_COMPILER;
  m.attr("NVCC") = DAB_NVCC;
  m.attr("CUDA_ARCHS") = DAB_CUDA_ARCHS;
  m.attr("WHY_NO_CUDA") = DAB_WHY_NO_CUDA;
  m.attr("MAX_FEATS") = dab_fast::kMaxFeats;
  py::tuple dtypes(4);
  for (size_t i = 0; i < 4; ++i) dtypes[i] = dab_fast::kDTypeNames[i];
  m.attr("DTYPES") = dtypes;
  py::dict scales;
  scales["per_element"] = int(Scale::per_element);
  scales["per_box"] = int(Scale::per_box);
  scales["shared"] = int(Scale::shared);
  m.attr("SCALES") = scales;
  bind_cpu(m);
#if defined(DAB_CUDA)
  bind_cuda(m);
  m.attr("HAS_CUDA") = true;
#else
  m.attr("HAS_CUDA") = false;
#endif
}
