#include "int8.h"

#include <nanobind/nanobind.h>

#include "table.h"

namespace nb = nanobind;

namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void quantize(uintptr_t x, bool wide, int64_t rows, int64_t columns, uintptr_t codes, uintptr_t absmax) {
  nb::gil_scoped_release release;
  tunegate::active().int8_quantize(at<void>(x), wide, rows, columns, at<int8_t>(codes), at<float>(absmax));
}

void dequantize(uintptr_t codes, uintptr_t absmax, int64_t rows, int64_t columns, uintptr_t out, bool wide) {
  nb::gil_scoped_release release;
  tunegate::active().int8_dequantize(at<int8_t>(codes), at<float>(absmax), rows, columns, at<void>(out), wide);
}

}  // namespace

void bind_int8(nb::module_& m) {
  m.def("int8_quantize", &quantize);
  m.def("int8_dequantize", &dequantize);
}
