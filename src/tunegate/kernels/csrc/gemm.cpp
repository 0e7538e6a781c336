#include "gemm.h"

#include "level.h"
#include "pool.h"

namespace tunegate::TUNEGATE_LEVEL {}
