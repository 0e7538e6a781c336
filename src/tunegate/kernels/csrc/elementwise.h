// Kernels between the matrix products: RMS norm, rotary positions, gated activations, dropout. Each walks rows once,
// in fp32 whatever the storage type, and rounds once at the end.
//
// None of them allocates, and none has a gradient for a norm's weight: the base is frozen.
#pragma once
#include <cstdint>

namespace tunegate {

struct StridedRows {
  void* data;
  int64_t stride;  // elements from row to row; inside a row elements are adjacent
};

struct RowsShape {
  int64_t rows, columns;
  bool is_bf16;
};

struct NormCall {
  RowsShape shape;
  StridedRows x, grad_out, out, add;  // grad_out and add: backward only; add.data may be null
  const void* weight;
  bool weight_is_bf16;
  float* inverse_rms;
  float eps, offset;
};

struct RopeCall {
  void* x;
  int64_t tokens, heads, token_stride, head_stride, rotated;  // rotated: even, the first dims of a head that turn
  StridedRows cosine, sine;
  bool is_bf16, angles_are_bf16, inverse;
};

enum class Activation { silu = 0, gelu_tanh = 1, gelu = 2 };

struct GluCall {
  RowsShape shape;
  StridedRows gate, up, out;                // out: forward only
  StridedRows grad_out, grad_gate, grad_up;  // backward only
  Activation activation;
};

// sums[j] = sum over rows of factor * grad * (out - bias), scaled = factor * grad * gain. Rows are summed in chunks of
// gain_chunk, so that any number of threads gives the same bytes; partial holds a row of fp32 for each chunk.
constexpr int64_t gain_chunk = 64;

struct GainCall {
  RowsShape shape;
  StridedRows grad, out, scaled;  // scaled may be grad
  const float *bias, *gain;       // bias may be null
  float *sums, *partial;
  float factor;
};

struct DropoutCall {
  RowsShape shape;
  StridedRows x, out;
  uint64_t seed;
  int64_t row_offset;
  uint32_t threshold;  // of 65536
  float scale;
  bool adds;
};

}  // namespace tunegate

#define ELEMENTWISE_KERNELS(X)                         \
  X(void, rms_norm, (const NormCall& call))            \
  X(void, rms_norm_backward, (const NormCall& call))   \
  X(void, rope, (const RopeCall& call))                \
  X(void, gated, (const GluCall& call))                \
  X(void, gated_backward, (const GluCall& call))       \
  X(void, gain_backward, (const GainCall& call))       \
  X(void, dropout, (const DropoutCall& call))          \
  X(void, vector_function, (int which, const float* x, float* out, int64_t count))
