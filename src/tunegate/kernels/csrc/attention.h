#pragma once
#include <cstdint>

#define ATTENTION_KERNELS(X)
