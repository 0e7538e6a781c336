// 4-bit weights in bitsandbytes' format (Dettmers et al. 2023, QLoRA): codes in blocks over the flat index, two a byte,
// the first in the high nibble; a block's scale is fp32, or an 8-bit code in blocks of 256. What the sixteen codes stand
// for (NF4, FP4, INT4) comes from the caller. A block is a power of two of at least 32 elements.
#pragma once
#include <cstdint>

namespace tunegate {

struct Nf4View {
  const uint8_t* codes;
  const float* values;  // 16, by code
  int64_t block;
  const float* absmax;  // one per block, or null: then nested_code[absmax_codes[b]] * nested_absmax[b / 256] + offset
  const uint8_t* absmax_codes;
  const float* nested_code;  // 256
  const float* nested_absmax;
  float offset;
};

// How values become codes: an element's rank is the number of bounds (15, ascending) that it lies above; `order` (16)
// gives the code of each rank, or is null where code and rank are the same.
struct Nf4Format {
  const float* bounds;
  const uint8_t* order;
  int64_t block;
};

}  // namespace tunegate

// nf4_quantize: x (n) to codes (ceil(n / 2)) and absmax (ceil(n / block)). nf4_quantize_scales: absmax (blocks) less the
// offset to codes and nested_absmax, by a table of the code nearest to each of 65536 points from -1 to 1.
// nf4_dequantize: the elements begin..end of the flat index to out[0..]. `wide`: fp32, otherwise bf16.
#define NF4_KERNELS(X)                                                                                              \
  X(void, nf4_quantize,                                                                                             \
    (const void* x, bool wide, int64_t n, const Nf4Format& format, uint8_t* codes, float* absmax))                  \
  X(void, nf4_quantize_scales,                                                                                      \
    (const float* absmax, float offset, int64_t blocks, const uint8_t* nearest, uint8_t* codes,                     \
     float* nested_absmax))                                                                                         \
  X(void, nf4_dequantize, (const Nf4View& weight, int64_t begin, int64_t end, void* out, bool wide))
