#pragma once
#include <cstdint>

#define ELEMENTWISE_KERNELS(X)
