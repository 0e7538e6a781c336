#include "loss.h"

#include <nanobind/nanobind.h>

#include "table.h"

namespace nb = nanobind;

namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// block: logits, rows, columns, stride, first column, labels, scale, soft cap (0: none)
tunegate::LogitsBlock read(nb::tuple block) {
  auto number = [&](int i) { return nb::cast<int64_t>(block[i]); };
  return {at<float>(nb::cast<uintptr_t>(block[0])),   number(1), number(2), number(3), number(4),
          at<int64_t>(nb::cast<uintptr_t>(block[5])), nb::cast<float>(block[6]), nb::cast<float>(block[7])};
}

void gradient(nb::tuple block, uintptr_t losses) {
  tunegate::LogitsBlock own = read(block);
  nb::gil_scoped_release release;
  tunegate::active().loss_gradient(own, at<float>(losses));
}

void update(nb::tuple block, uintptr_t most, uintptr_t total, uintptr_t target) {
  tunegate::LogitsBlock own = read(block);
  nb::gil_scoped_release release;
  tunegate::active().loss_update(own, {at<float>(most), at<float>(total), at<float>(target)});
}

void best(nb::tuple block, uintptr_t values, uintptr_t columns) {
  tunegate::LogitsBlock own = read(block);
  nb::gil_scoped_release release;
  tunegate::active().loss_best(own, at<float>(values), at<int64_t>(columns));
}

}  // namespace

void bind_loss(nb::module_& m) {
  m.def("loss_gradient", &gradient);
  m.def("loss_update", &update);
  m.def("loss_best", &best);
}
