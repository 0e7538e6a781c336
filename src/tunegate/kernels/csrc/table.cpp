// Compiled once per level: the level's own table.
#include "level.h"
#include "table.h"

namespace tunegate::TUNEGATE_LEVEL {

#define TUNEGATE_DECLARE(result, name, arguments) result name arguments;
TUNEGATE_KERNELS(TUNEGATE_DECLARE)

extern const Kernels table;
const Kernels table = {
#define TUNEGATE_ENTRY(result, name, arguments) &name,
    TUNEGATE_KERNELS(TUNEGATE_ENTRY)
};

}  // namespace tunegate::TUNEGATE_LEVEL
