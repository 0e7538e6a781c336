// AdamW over a list of tensors in one call, and the global norm of a list of gradients.
//
// The tensors are laid end to end in thought and cut into tasks of equal length, so that hundreds of small ones cost
// as little as one large one. fp32 only, but for moments kept as 8-bit codes in blocks of 256 (Dettmers et al. 2022):
// a value over its block's largest magnitude becomes the nearest value of a map, the smaller magnitude in a tie.
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

// A map of 256 values. `bounds`: midpoints of neighbouring magnitudes, ascending, then infinity; a magnitude's rank is
// the number of bounds that it lies above. `starts`: the rank of the smallest magnitude with the same upper 16 bits, for
// those from 2^-23, which is below every bound, to 1; no two bounds share them.
struct Codebook {
  const float *values, *bounds;
  const uint8_t* starts;
};

// `first` is a running mean by a signed map whose code 127 is 0, `second` by an unsigned one. A scale is one of 256.
struct Adamw8Tensor {
  float* parameter;
  const float* gradient;
  uint8_t *first, *second;
  float *first_scales, *second_scales;
  int64_t count, group;
};

// starts[i] is the place of tensor i's first element in the thought row; starts[count] is its length.
struct TensorRow {
  const int64_t* starts;
  int64_t count;
};

constexpr int64_t kAdamwTask = 16384;  // elements of a task, and of a partial sum
constexpr int64_t kAdamw8Block = 256;

}  // namespace tunegate

// adamw8: the row's tensors are counted in whole blocks, so that no task cuts one.
// gradient_squares writes the sum of (scale g)^2 of each task to partials and, if `writes`, scale g over g.
#define ADAMW_KERNELS(X)                                                                                         \
  X(void, adamw, (TensorRow row, const AdamwTensor* tensors, const AdamwGroup* groups))                           \
  X(void, adamw8,                                                                                                \
    (TensorRow row, const Adamw8Tensor* tensors, const AdamwGroup* groups, const Codebook& with_sign,             \
     const Codebook& without_sign))                                                                              \
  X(void, gradient_squares, (TensorRow row, float* const* gradients, float scale, bool writes, double* partials)) \
  X(void, scale_gradients, (TensorRow row, float* const* gradients, float scale, float coefficient))
