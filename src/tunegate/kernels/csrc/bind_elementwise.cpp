#include "elementwise.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>

#include <atomic>
#include <new>
#include <utility>

#include "pool.h"
#include "recording.h"
#include "table.h"

namespace nb = nanobind;
using namespace tunegate;

namespace {

using Rows = std::pair<uintptr_t, int64_t>;  // address and row stride in elements
using Shape = std::pair<int64_t, int64_t>;

StridedRows strided(const Rows& rows) { return {reinterpret_cast<void*>(rows.first), rows.second}; }
RowsShape shaped(const Shape& shape, bool is_bf16) { return {shape.first, shape.second, is_bf16}; }

void rms_norm(Shape shape, bool is_bf16, Rows x, Rows out, uintptr_t weight, bool weight_is_bf16,
              uintptr_t inverse_rms, float eps, float offset) {
  NormCall call{};
  call.shape = shaped(shape, is_bf16);
  call.x = strided(x), call.out = strided(out);
  call.weight = reinterpret_cast<const void*>(weight), call.weight_is_bf16 = weight_is_bf16;
  call.inverse_rms = reinterpret_cast<float*>(inverse_rms);
  call.eps = eps, call.offset = offset;
  issue([call] { active().rms_norm(call); });
}

void rms_norm_backward(Shape shape, bool is_bf16, Rows grad_out, Rows x, Rows out, Rows add, uintptr_t weight,
                       bool weight_is_bf16, uintptr_t inverse_rms, float offset) {
  NormCall call{};
  call.shape = shaped(shape, is_bf16);
  call.x = strided(x), call.grad_out = strided(grad_out), call.out = strided(out), call.add = strided(add);
  call.weight = reinterpret_cast<const void*>(weight), call.weight_is_bf16 = weight_is_bf16;
  call.inverse_rms = reinterpret_cast<float*>(inverse_rms);
  call.offset = offset;
  active().rms_norm_backward(call);
}

void rope(uintptr_t x, Shape shape, Shape strides, int64_t rotated, Rows cosine, Rows sine, bool is_bf16,
          bool angles_are_bf16, bool inverse) {
  RopeCall call{};
  call.x = reinterpret_cast<void*>(x);
  call.tokens = shape.first, call.heads = shape.second;
  call.token_stride = strides.first, call.head_stride = strides.second;
  call.rotated = rotated;
  call.cosine = strided(cosine), call.sine = strided(sine);
  call.is_bf16 = is_bf16, call.angles_are_bf16 = angles_are_bf16, call.inverse = inverse;
  issue([call] { active().rope(call); });
}

void gated(Shape shape, bool is_bf16, Rows gate, Rows up, Rows out, int activation) {
  GluCall call{};
  call.shape = shaped(shape, is_bf16);
  call.gate = strided(gate), call.up = strided(up), call.out = strided(out);
  call.activation = Activation(activation);
  issue([call] { active().gated(call); });
}

void gated_backward(Shape shape, bool is_bf16, Rows grad_out, Rows gate, Rows up, Rows grad_gate, Rows grad_up,
                    int activation) {
  GluCall call{};
  call.shape = shaped(shape, is_bf16);
  call.gate = strided(gate), call.up = strided(up), call.grad_out = strided(grad_out);
  call.grad_gate = strided(grad_gate), call.grad_up = strided(grad_up);
  call.activation = Activation(activation);
  active().gated_backward(call);
}

void gain_backward(Shape shape, bool is_bf16, Rows grad, Rows out, Rows scaled, uintptr_t bias, uintptr_t gain,
                   uintptr_t sums, uintptr_t partial, float factor) {
  GainCall call{};
  call.shape = shaped(shape, is_bf16);
  call.grad = strided(grad), call.out = strided(out), call.scaled = strided(scaled);
  call.bias = reinterpret_cast<const float*>(bias), call.gain = reinterpret_cast<const float*>(gain);
  call.sums = reinterpret_cast<float*>(sums), call.partial = reinterpret_cast<float*>(partial);
  call.factor = factor;
  active().gain_backward(call);
}

void dropout(Shape shape, bool is_bf16, Rows x, Rows out, uint64_t seed, int64_t row_offset, uint32_t threshold,
             float scale, bool adds) {
  active().dropout({shaped(shape, is_bf16), strided(x), strided(out), seed, row_offset, threshold, scale, adds});
}

void vector_function(int which, uintptr_t x, uintptr_t out, int64_t count) {
  active().vector_function(which, reinterpret_cast<const float*>(x), reinterpret_cast<float*>(out), count);
}

// For tests of the pool: the sum of i * inner + j over tasks within tasks; task `failing` throws.
int64_t nested_tasks(int64_t outer, int64_t inner, int64_t failing) {
  std::atomic<int64_t> sum{0};
  parallel(outer, [&](int64_t i) {
    if (i == failing) throw std::bad_alloc();
    parallel(inner, [&](int64_t j) { sum += i * inner + j; });
  });
  return sum;
}

}  // namespace

void bind_elementwise(nb::module_& m) {
  using Free = nb::call_guard<nb::gil_scoped_release>;
  m.def("rms_norm", &rms_norm, Free());
  m.def("rms_norm_backward", &rms_norm_backward, Free());
  m.def("rope", &rope, Free());
  m.def("gated", &gated, Free());
  m.def("gated_backward", &gated_backward, Free());
  m.def("gain_backward", &gain_backward, Free());
  m.def("dropout", &dropout, Free());
  m.def("_test_nested_tasks", &nested_tasks, Free());
  m.def("_test_vector_function", &vector_function, Free());
}
