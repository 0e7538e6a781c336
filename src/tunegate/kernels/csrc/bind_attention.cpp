#include "attention.h"

#include <nanobind/nanobind.h>

#include "table.h"

namespace nb = nanobind;

void bind_attention(nb::module_& m) { (void)m; }
