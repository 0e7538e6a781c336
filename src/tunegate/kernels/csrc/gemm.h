// Matrix products: out = column_scale * (alpha * sum of x @ w) + bias + add, several of them in one parallel region.
#pragma once
#include <cstdint>

namespace tunegate {

enum GemmType : int32_t { kFp32 = 0, kBf16 = 1, kFourBits = 2, kInt8 = 3 };

// One summand x @ w.T; strides count elements between rows.
struct GemmTerm {
  const void* x;  // (m, k), or (k, m) if x_is_km
  const void* w;  // (n, k), or (k, n) if w_is_kn; of kFourBits the codes, two a byte, high nibble first; of kInt8 bytes
  int64_t x_stride, w_stride;  // of codes: w_stride is the row length of the quantized matrix
  int64_t k;
  int32_t x_type, w_type;
  bool x_is_km, w_is_kn;
  // kInt8: code c of row r stands for c * absmax[r] / 127. kFourBits: code c stands for values[c], 2^block_shift codes
  // share a scale; the scale of block b is absmax[b], or if absmax is null
  // nested_code[absmax_codes[b]] * nested_absmax[b / 256] + offset.
  const float* values;
  int32_t block_shift;
  const float* absmax;
  const uint8_t* absmax_codes;
  const float* nested_code;
  const float* nested_absmax;
  float offset;
};

constexpr int kMostTerms = 8;

struct GemmProduct {
  void* out;  // (m, n)
  const void* add;  // (m, n) of out's type, or null; may be out
  const void* bias;  // (n), or null
  const float* column_scale;  // (n), or null
  int64_t m, n, out_stride, add_stride;
  float alpha;
  int32_t out_type, bias_type, terms;
  GemmTerm term[kMostTerms];
};

}  // namespace tunegate

#define GEMM_KERNELS(X) X(void, gemm, (const GemmProduct* products, int64_t count))
