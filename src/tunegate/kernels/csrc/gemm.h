#pragma once
#include <cstdint>

#define GEMM_KERNELS(X)
