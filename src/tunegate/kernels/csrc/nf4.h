// NF4 weights in bitsandbytes' format (Dettmers et al. 2023, QLoRA): 4-bit codes in blocks of 64 over the flat index,
// two a byte, the first in the high nibble; a block's scale is fp32, or an 8-bit code in blocks of 256.
#pragma once
#include <cstdint>

namespace tunegate {

// The sixteen values of NF4 (Dettmers et al. 2023, QLoRA, appendix E; bitsandbytes' constants).
alignas(64) constexpr float kNf4Values[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

struct Nf4View {
  const uint8_t* codes;
  const float* absmax;  // one per block, or null: then nested_code[absmax_codes[b]] * nested_absmax[b / 256] + offset
  const uint8_t* absmax_codes;
  const float* nested_code;  // 256
  const float* nested_absmax;
  float offset;
};

}  // namespace tunegate

// nf4_quantize: x (n) to codes (ceil(n / 2)) and absmax (ceil(n / 64)). nf4_quantize_scales: absmax (blocks) less the
// offset to codes and nested_absmax, by a table of the code nearest to each of 65536 points from -1 to 1.
// nf4_dequantize: the elements begin..end of the flat index to out[0..]. `wide`: fp32, otherwise bf16.
#define NF4_KERNELS(X)                                                                                              \
  X(void, nf4_quantize, (const void* x, bool wide, int64_t n, uint8_t* codes, float* absmax))                       \
  X(void, nf4_quantize_scales,                                                                                      \
    (const float* absmax, float offset, int64_t blocks, const uint8_t* nearest, uint8_t* codes,                     \
     float* nested_absmax))                                                                                         \
  X(void, nf4_dequantize, (const Nf4View& weight, int64_t begin, int64_t end, void* out, bool wide))
