#pragma once
#include <cstdint>

#define LOSS_KERNELS(X)
