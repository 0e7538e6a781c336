#include "nf4.h"

#include <nanobind/nanobind.h>

#include "table.h"

namespace nb = nanobind;

namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void quantize(uintptr_t x, bool wide, int64_t n, uintptr_t codes, uintptr_t absmax) {
  nb::gil_scoped_release release;
  tunegate::active().nf4_quantize(at<void>(x), wide, n, at<uint8_t>(codes), at<float>(absmax));
}

void quantize_scales(uintptr_t absmax, float offset, int64_t blocks, uintptr_t nearest, uintptr_t codes,
                     uintptr_t nested_absmax) {
  nb::gil_scoped_release release;
  tunegate::active().nf4_quantize_scales(at<float>(absmax), offset, blocks, at<uint8_t>(nearest), at<uint8_t>(codes),
                                         at<float>(nested_absmax));
}

// weight: the addresses of codes, absmax, absmax_codes, nested_code and nested_absmax, and the offset
void dequantize(nb::tuple weight, int64_t begin, int64_t end, uintptr_t out, bool wide) {
  auto address = [&](int i) { return nb::cast<uintptr_t>(weight[i]); };
  tunegate::Nf4View view{at<uint8_t>(address(0)), at<float>(address(1)), at<uint8_t>(address(2)),
                         at<float>(address(3)),   at<float>(address(4)), nb::cast<float>(weight[5])};
  nb::gil_scoped_release release;
  tunegate::active().nf4_dequantize(view, begin, end, at<void>(out), wide);
}

}  // namespace

void bind_nf4(nb::module_& m) {
  m.def("nf4_quantize", &quantize);
  m.def("nf4_quantize_scales", &quantize_scales);
  m.def("nf4_dequantize", &dequantize);
}
