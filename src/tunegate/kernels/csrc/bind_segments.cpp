// add_segments(x, table, segments, targets, work) and lay_out(data, memory, parts, count, type): addresses and sizes,
// checked by tunegate.kernels.segments.
#include "segments.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <tuple>
#include <vector>

#include "recording.h"
#include "table.h"

namespace nb = nanobind;
using namespace tunegate;

namespace {

using Matrix = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int32_t>;  // address, stride, rows, columns, type
using Table = std::tuple<uintptr_t, int64_t, int64_t, int32_t>;            // address, columns, largest rank, type
using Target = std::tuple<uintptr_t, int64_t, int64_t, uintptr_t, int32_t, int64_t>;

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void add(const Matrix& x, const Table& table, uintptr_t segments, const std::vector<Target>& targets, uintptr_t work) {
  if (targets.size() > kMostTargets) throw std::invalid_argument("add_segments: at most 4 projections of one input");
  SegmentsCall call{};
  int32_t type = 0;
  uintptr_t x_at = 0, table_at = 0;
  std::tie(x_at, call.x_stride, call.rows, call.k, type) = x;
  std::tie(table_at, call.columns, call.most_rank, call.factor_type) = table;
  call.x = at<const void>(x_at);
  call.type = type;
  call.table = at<const Factors>(table_at);
  call.segments = at<const int64_t>(segments);
  call.targets = int(targets.size());
  for (size_t i = 0; i < targets.size(); i++) {
    SegmentTarget& t = call.target[i];
    uintptr_t out = 0, bias = 0;
    std::tie(out, t.stride, t.n, bias, t.bias_type, t.column) = targets[i];
    t.out = at<void>(out);
    t.bias = at<const void>(bias);
  }
  call.work = at<float>(work);
  nb::gil_scoped_release released;
  issue([call] { active().add_segments(call); });
}

// The bits of the largest magnitudes: of what is laid straight, and of what is transposed. Of each of `count` parts:
// first byte of `data`, first element of `memory`, rows, columns, transposed.
std::tuple<uint32_t, uint32_t> lay(uintptr_t data, uintptr_t memory, uintptr_t parts, int64_t count, int32_t type) {
  const int64_t* part = at<const int64_t>(parts);
  int64_t size = type == kBf16 ? 2 : 4;
  std::vector<LayOut> all;
  all.reserve(size_t(count));
  for (int64_t i = 0; i < count; i++, part += 5)
    all.push_back({at<const char>(data) + part[0], at<char>(memory) + part[1] * size, part[2], part[3], part[4] != 0});
  uint32_t largest[2];
  nb::gil_scoped_release released;
  active().lay_out(all.data(), count, type, largest);
  return {largest[0], largest[1]};
}

}  // namespace

void bind_segments(nb::module_& m) {
  m.def("add_segments", &add);
  m.def("lay_out", &lay);
}
