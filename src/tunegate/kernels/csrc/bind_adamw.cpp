#include "adamw.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <vector>

#include "table.h"

namespace nb = nanobind;
using namespace tunegate;

namespace {

std::vector<int64_t> starts_of(const std::vector<int64_t>& counts) {
  std::vector<int64_t> starts{0};
  for (int64_t count : counts) starts.push_back(starts.back() + count);
  return starts;
}

AdamwGroup at_step(const std::array<double, 5>& group, double step) {
  const auto& [lr, beta1, beta2, eps, decay] = group;
  return {float(1 - lr * decay), float(lr / (1 - std::pow(beta1, step))), float(1 - beta1), float(beta2),
          float(1 - beta2), float(eps), float(1 / std::sqrt(1 - std::pow(beta2, step)))};
}

using Groups = std::vector<std::array<double, 5>>;  // lr, beta1, beta2, eps, weight decay

// The hyperparameters of tensors at their own steps, those of neighbours that agree once.
struct Schedule {
  const Groups& groups;
  std::vector<AdamwGroup> by;
  int64_t last_group = -1;
  float last_step = 0;

  // Counts the step up and returns the index in `by`.
  int64_t next(int64_t step_address, int64_t group) {
    float step = *reinterpret_cast<float*>(step_address) += 1;
    if (group != last_group || step != last_step) by.push_back(at_step(groups[size_t(group)], step));
    last_group = group, last_step = step;
    return int64_t(by.size()) - 1;
  }
};

// tensors: addresses of parameter, gradient, exp_avg, exp_avg_sq and step, the number of elements, the group's index.
void adamw(const std::vector<std::array<int64_t, 7>>& tensors, const Groups& groups) {
  nb::gil_scoped_release free;
  std::vector<AdamwTensor> each;
  std::vector<int64_t> counts;
  Schedule schedule{groups, {}};
  for (const auto& [parameter, gradient, first, second, step, count, group] : tensors) {
    counts.push_back(count);
    each.push_back({reinterpret_cast<float*>(parameter), reinterpret_cast<const float*>(gradient),
                    reinterpret_cast<float*>(first), reinterpret_cast<float*>(second), schedule.next(step, group)});
  }
  std::vector<int64_t> starts = starts_of(counts);
  active().adamw({starts.data(), int64_t(each.size())}, each.data(), schedule.by.data());
}

Codebook codebook(const std::array<int64_t, 3>& addresses) {
  return {reinterpret_cast<const float*>(addresses[0]), reinterpret_cast<const float*>(addresses[1]),
          reinterpret_cast<const uint8_t*>(addresses[2])};
}

// tensors: addresses of parameter, gradient, codes and codes of the second moment, scales of both and step, the number
// of elements, the group's index. A map is values, bounds and starts.
void adamw8(const std::vector<std::array<int64_t, 9>>& tensors, const Groups& groups,
            const std::array<int64_t, 3>& with_sign, const std::array<int64_t, 3>& without_sign) {
  nb::gil_scoped_release free;
  std::vector<Adamw8Tensor> each;
  std::vector<int64_t> counts;
  Schedule schedule{groups, {}};
  for (const auto& [parameter, gradient, first, second, first_scales, second_scales, step, count, group] : tensors) {
    counts.push_back((count + kAdamw8Block - 1) / kAdamw8Block * kAdamw8Block);
    each.push_back({reinterpret_cast<float*>(parameter), reinterpret_cast<const float*>(gradient),
                    reinterpret_cast<uint8_t*>(first), reinterpret_cast<uint8_t*>(second),
                    reinterpret_cast<float*>(first_scales), reinterpret_cast<float*>(second_scales), count,
                    schedule.next(step, group)});
  }
  std::vector<int64_t> starts = starts_of(counts);
  active().adamw8({starts.data(), int64_t(each.size())}, each.data(), schedule.by.data(), codebook(with_sign),
                  codebook(without_sign));
}

double clip_and_scale(const std::vector<int64_t>& gradients, const std::vector<int64_t>& counts, double scale,
                      std::optional<double> max_norm) {
  nb::gil_scoped_release free;
  std::vector<float*> each;
  for (int64_t address : gradients) each.push_back(reinterpret_cast<float*>(address));
  std::vector<int64_t> starts = starts_of(counts);
  TensorRow row{starts.data(), int64_t(each.size())};
  std::vector<double> partials(size_t((starts.back() + kAdamwTask - 1) / kAdamwTask));
  bool one_pass = !max_norm && scale != 1;
  active().gradient_squares(row, each.data(), float(scale), one_pass, partials.data());
  double squares = 0;
  for (double partial : partials) squares += partial;
  double norm = std::sqrt(squares);
  if (max_norm) {
    double ratio = *max_norm / (norm + 1e-6);
    double coefficient = ratio > 1 ? 1 : ratio;  // a NaN stays one, as in torch
    if (scale != 1 || coefficient != 1)
      active().scale_gradients(row, each.data(), float(scale), float(coefficient));
  }
  return norm;
}

}  // namespace

void bind_adamw(nb::module_& m) {
  m.def("adamw", &adamw);
  m.def("adamw8", &adamw8);
  m.def("clip_and_scale", &clip_and_scale, nb::arg(), nb::arg(), nb::arg(), nb::arg().none());
}
