// 8-bit weights as LLM.int8() stores them (Dettmers et al. 2022, arXiv 2208.07339): signed bytes and one fp32 scale for
// each row, its largest magnitude. Code c of a row stands for c * absmax / 127.
#pragma once
#include <cstdint>

namespace tunegate {

constexpr float kInt8Step = 7.874015718698502e-3f;  // 1 / 127: bitsandbytes multiplies

}  // namespace tunegate

// int8_quantize: x (rows, columns) to codes of the same shape and absmax (rows). int8_dequantize: back, to fp32 or bf16.
// `wide`: fp32, otherwise bf16.
#define INT8_KERNELS(X)                                                                                        \
  X(void, int8_quantize, (const void* x, bool wide, int64_t rows, int64_t columns, int8_t* codes, float* absmax)) \
  X(void, int8_dequantize,                                                                                     \
    (const int8_t* codes, const float* absmax, int64_t rows, int64_t columns, void* out, bool wide))
