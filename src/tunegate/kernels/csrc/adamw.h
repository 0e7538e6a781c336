#pragma once
#include <cstdint>

#define ADAMW_KERNELS(X)
