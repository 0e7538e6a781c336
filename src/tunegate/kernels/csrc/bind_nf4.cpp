#include "nf4.h"

#include <nanobind/nanobind.h>

#include "table.h"

namespace nb = nanobind;

void bind_nf4(nb::module_& m) { (void)m; }
