// AdamW over a list of tensors in one call, and the global norm of a list of gradients.
//
// The tensors are laid end to end in thought and cut into tasks of equal length, so that hundreds of small ones cost
// as little as one large one. fp32 only.
#pragma once
#include <cstdint>

namespace tunegate {

struct AdamwTensor {
  float* parameter;
  const float* gradient;
  float *first, *second;  // running means of the gradient and of its square
  int64_t group;          // index into the hyperparameters
};

struct AdamwGroup {
  float keep;       // 1 - lr * weight_decay
  float step_size;  // lr / (1 - beta1^step)
  float beta1_rest, beta2, beta2_rest, eps;
  float inverse_root;  // 1 / sqrt(1 - beta2^step)
};

// starts[i] is the place of tensor i's first element in the thought row; starts[count] is its length.
struct TensorRow {
  const int64_t* starts;
  int64_t count;
};

constexpr int64_t kAdamwTask = 16384;  // elements of a task, and of a partial sum

}  // namespace tunegate

// gradient_squares writes the sum of (scale g)^2 of each task to partials and, if `writes`, scale g over g.
#define ADAMW_KERNELS(X)                                                                                         \
  X(void, adamw, (TensorRow row, const AdamwTensor* tensors, const AdamwGroup* groups))                           \
  X(void, gradient_squares, (TensorRow row, float* const* gradients, float scale, bool writes, double* partials)) \
  X(void, scale_gradients, (TensorRow row, float* const* gradients, float scale, float coefficient))
