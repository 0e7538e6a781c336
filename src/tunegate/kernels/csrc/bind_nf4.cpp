#include "nf4.h"

#include <nanobind/nanobind.h>

#include "table.h"

namespace nb = nanobind;

namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// format: the addresses of bounds and order (0: none), and the block size
void quantize(uintptr_t x, bool wide, int64_t n, nb::tuple format, uintptr_t codes, uintptr_t absmax) {
  tunegate::Nf4Format chosen{at<float>(nb::cast<uintptr_t>(format[0])), at<uint8_t>(nb::cast<uintptr_t>(format[1])),
                             nb::cast<int64_t>(format[2])};
  nb::gil_scoped_release release;
  tunegate::active().nf4_quantize(at<void>(x), wide, n, chosen, at<uint8_t>(codes), at<float>(absmax));
}

void quantize_scales(uintptr_t absmax, float offset, int64_t blocks, uintptr_t nearest, uintptr_t codes,
                     uintptr_t nested_absmax) {
  nb::gil_scoped_release release;
  tunegate::active().nf4_quantize_scales(at<float>(absmax), offset, blocks, at<uint8_t>(nearest), at<uint8_t>(codes),
                                         at<float>(nested_absmax));
}

// weight: the addresses of codes and values, the block size, the addresses of absmax, absmax_codes, nested_code and
// nested_absmax, and the offset
void dequantize(nb::tuple weight, int64_t begin, int64_t end, uintptr_t out, bool wide) {
  auto address = [&](int i) { return nb::cast<uintptr_t>(weight[i]); };
  tunegate::Nf4View view{at<uint8_t>(address(0)), at<float>(address(1)), nb::cast<int64_t>(weight[2]),
                         at<float>(address(3)),   at<uint8_t>(address(4)), at<float>(address(5)),
                         at<float>(address(6)),   nb::cast<float>(weight[7])};
  nb::gil_scoped_release release;
  tunegate::active().nf4_dequantize(view, begin, end, at<void>(out), wide);
}

}  // namespace

void bind_nf4(nb::module_& m) {
  m.def("nf4_quantize", &quantize);
  m.def("nf4_quantize_scales", &quantize_scales);
  m.def("nf4_dequantize", &dequantize);
}
