#pragma once
#include <cstdint>

#define NF4_KERNELS(X)
