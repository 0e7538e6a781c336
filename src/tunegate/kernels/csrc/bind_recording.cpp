// A recording as an object of Python: begin(), then end(), then run().
#include "recording.h"

#include <nanobind/nanobind.h>

#include <stdexcept>

namespace nb = nanobind;

namespace tunegate {

Recording*& recording_now() {
  thread_local Recording* now = nullptr;
  return now;
}

}  // namespace tunegate

namespace {

struct Recorder {
  tunegate::Recording calls;
  void begin() {
    if (tunegate::recording_now()) throw std::logic_error("a recording is under way");
    tunegate::recording_now() = &calls;
  }
  void end() { tunegate::recording_now() = nullptr; }
  void run() const {
    nb::gil_scoped_release released;
    for (const auto& call : calls) call();
  }
  int64_t count() const { return int64_t(calls.size()); }
};

}  // namespace

void bind_recording(nb::module_& m) {
  nb::class_<Recorder>(m, "Recorder")
      .def(nb::init<>())
      .def("begin", &Recorder::begin)
      .def("end", &Recorder::end)
      .def("run", &Recorder::run)
      .def("__len__", &Recorder::count);
}
