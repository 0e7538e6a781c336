// The Python module: each family binds its own functions. Addresses and sizes come in as integers; the Python side
// has checked dtypes, shapes and strides. The GIL is let go while a kernel runs.
#include <nanobind/nanobind.h>

#include "pool.h"
#include "table.h"

namespace nb = nanobind;

void bind_adamw(nb::module_&);
void bind_attention(nb::module_&);
void bind_elementwise(nb::module_&);
void bind_gemm(nb::module_&);
void bind_int8(nb::module_&);
void bind_loss(nb::module_&);
void bind_nf4(nb::module_&);
void bind_recording(nb::module_&);
void bind_segments(nb::module_&);

NB_MODULE(_native, m) {
  tunegate::active();  // an impossible TUNEGATE_CPU_LEVEL is an error here, not in the first kernel
  m.def("level", &tunegate::level_name);
  m.def("level_reason", &tunegate::level_reason);
  m.def("levels_here", &tunegate::levels_here);
  m.def("set_threads", &tunegate::set_threads);
  m.def("threads", &tunegate::threads);
  bind_adamw(m);
  bind_attention(m);
  bind_elementwise(m);
  bind_gemm(m);
  bind_int8(m);
  bind_loss(m);
  bind_nf4(m);
  bind_recording(m);
  bind_segments(m);
}
