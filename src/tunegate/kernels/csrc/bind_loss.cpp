#include "loss.h"

#include <nanobind/nanobind.h>

#include "table.h"

namespace nb = nanobind;

void bind_loss(nb::module_& m) { (void)m; }
