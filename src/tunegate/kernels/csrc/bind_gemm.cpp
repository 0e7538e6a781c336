// gemm(products): each product is one flat tuple of integers and floats in the order of tunegate.kernels.linear.
#include "gemm.h"

#include <nanobind/nanobind.h>

#include <stdexcept>
#include <utility>
#include <vector>

#include "recording.h"
#include "table.h"

namespace nb = nanobind;

namespace {

struct Reader {
  PyObject* tuple;
  Py_ssize_t at = 0;

  PyObject* item() {
    PyObject* found = PyTuple_GetItem(tuple, at++);
    if (!found) throw nb::python_error();
    return found;
  }
  int64_t integer() {
    long long value = PyLong_AsLongLong(item());
    if (value == -1 && PyErr_Occurred()) throw nb::python_error();
    return value;
  }
  template <typename T>
  T* pointer() {
    return reinterpret_cast<T*>(integer());
  }
  float real() {
    double value = PyFloat_AsDouble(item());
    if (value == -1.0 && PyErr_Occurred()) throw nb::python_error();
    return float(value);
  }
};

tunegate::GemmTerm read_term(Reader& reader) {
  tunegate::GemmTerm t{};
  t.x = reader.pointer<const void>();
  t.x_stride = reader.integer();
  t.x_type = int32_t(reader.integer());
  t.x_is_km = reader.integer() != 0;
  t.w = reader.pointer<const void>();
  t.w_stride = reader.integer();
  t.w_type = int32_t(reader.integer());
  t.w_is_kn = reader.integer() != 0;
  t.k = reader.integer();
  if (t.w_type == tunegate::kInt8) t.absmax = reader.pointer<const float>();
  if (t.w_type != tunegate::kFourBits) return t;
  t.values = reader.pointer<const float>();
  t.block_shift = int32_t(reader.integer());
  t.absmax = reader.pointer<const float>();
  t.absmax_codes = reader.pointer<const uint8_t>();
  t.nested_code = reader.pointer<const float>();
  t.nested_absmax = reader.pointer<const float>();
  t.offset = reader.real();
  return t;
}

tunegate::GemmProduct read_product(PyObject* tuple) {
  Reader reader{tuple};
  tunegate::GemmProduct p{};
  p.out = reader.pointer<void>();
  p.out_stride = reader.integer();
  p.out_type = int32_t(reader.integer());
  p.m = reader.integer();
  p.n = reader.integer();
  p.alpha = reader.real();
  p.add = reader.pointer<const void>();
  p.add_stride = reader.integer();
  p.bias = reader.pointer<const void>();
  p.bias_type = int32_t(reader.integer());
  p.column_scale = reader.pointer<const float>();
  p.terms = int32_t(reader.integer());
  if (p.terms < 0 || p.terms > tunegate::kMostTerms) throw std::invalid_argument("gemm: 0 to 8 terms");
  for (int t = 0; t < p.terms; t++) p.term[t] = read_term(reader);
  return p;
}

void gemm(nb::list list) {
  std::vector<tunegate::GemmProduct> products;
  products.reserve(list.size());
  for (nb::handle item : list) products.push_back(read_product(item.ptr()));
  nb::gil_scoped_release unlocked;
  tunegate::issue(
      [products = std::move(products)] { tunegate::active().gemm(products.data(), int64_t(products.size())); });
}

}  // namespace

void bind_gemm(nb::module_& m) { m.def("gemm", &gemm); }
