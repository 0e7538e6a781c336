#include "adamw.h"

#include <nanobind/nanobind.h>

#include "table.h"

namespace nb = nanobind;

void bind_adamw(nb::module_& m) { (void)m; }
