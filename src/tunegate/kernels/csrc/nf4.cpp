#include "nf4.h"

#include "level.h"
#include "pool.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace tunegate::TUNEGATE_LEVEL {
namespace {

constexpr int64_t kPiece = 32, kMostBlock = 4096, kNestedBlock = 256;
constexpr int64_t kTask = 16384;        // elements
constexpr float kLeastAbsmax = 1e-38f;  // bitsandbytes' floor before it divides

// Through memory: keeps a product rounded by itself, where the compiler would contract it into a multiply-add.
inline float rounded(float x) {
  asm("" : "+m"(x));
  return x;
}

// The number of bounds that each x lies above: the rank of the nearest value, the lower one in a tie.
inline vint nearest(vfloat x, const float* bounds) {
  vint above = {};
  for (int i = 0; i < 15; i++) above -= (vint)(x > bounds[i]);
  return above;
}

inline void pack(const int32_t* ranks, int64_t pairs, const uint8_t* order, uint8_t* codes) {
  if (!order) {
    for (int64_t i = 0; i < pairs; i++) codes[i] = uint8_t(ranks[2 * i] << 4 | ranks[2 * i + 1]);
    return;
  }
  for (int64_t i = 0; i < pairs; i++) codes[i] = uint8_t(order[ranks[2 * i]] << 4 | order[ranks[2 * i + 1]]);
}

// Magnitudes compare as integers, and a NaN compares above all of them: it reaches absmax, where the caller sees it.
template <typename T>
inline void quantize_block(const T* x, const Nf4Format& format, uint8_t* codes, float* absmax) {
  const int64_t block = format.block;
  vint largest_bits = {};
  for (int64_t i = 0; i < block; i += W) {
    vint bits = (vint)load(x + i) & 0x7fffffff;
    vint more = (vint)(bits > largest_bits);
    largest_bits = (bits & more) | (largest_bits & ~more);
  }
  int32_t lanes[W], most = 0;
  memcpy(lanes, &largest_bits, sizeof lanes);
  for (int i = 0; i < W; i++) most = lanes[i] > most ? lanes[i] : most;
  memcpy(absmax, &most, 4);
  float inverse = 1.0f / (*absmax < kLeastAbsmax ? kLeastAbsmax : *absmax);
  for (int64_t piece = 0; piece < block; piece += kPiece) {
    int32_t ranks[kPiece];
    for (int64_t i = 0; i < kPiece; i += W) {
      vint found = nearest(load(x + piece + i) * inverse, format.bounds);
      memcpy(ranks + i, &found, sizeof found);
    }
    pack(ranks, kPiece / 2, format.order, codes + piece / 2);
  }
}

// The last block if it is short: bitsandbytes divides here, and its stored absmax has the floor.
template <typename T>
void quantize_rest(const T* x, int64_t n, const Nf4Format& format, uint8_t* codes, float* absmax) {
  float most = kLeastAbsmax;
  for (int64_t i = 0; i < n; i++) {
    float magnitude = fabsf(to_float(x[i]));
    if (!(magnitude <= most)) most = magnitude;
    if (most != most) break;
  }
  *absmax = most;
  int32_t ranks[kMostBlock + 1];
  for (int64_t i = 0; i <= n; i++) {
    float scaled = i < n ? to_float(x[i]) / most : 0.0f;  // where n is odd, a zero fills the last byte
    ranks[i] = 0;
    for (int v = 0; v < 15; v++) ranks[i] += scaled > format.bounds[v];
  }
  pack(ranks, (n + 1) / 2, format.order, codes);
}

template <typename T>
void quantize(const T* x, int64_t n, const Nf4Format& format, uint8_t* codes, float* absmax) {
  const int64_t block = format.block, blocks = n / block, each = kTask / block;
  parallel((blocks + each - 1) / each, [&](int64_t task) {
    int64_t stop = min_of(blocks, (task + 1) * each);
    for (int64_t b = task * each; b < stop; b++)
      quantize_block(x + b * block, format, codes + b * block / 2, absmax + b);
  });
  if (n % block)
    quantize_rest(x + blocks * block, n % block, format, codes + blocks * block / 2, absmax + blocks);
}

inline float scale_of(const Nf4View& w, int64_t block) {
  if (w.absmax) return w.absmax[block];
  return rounded(w.nested_code[w.absmax_codes[block]] * w.nested_absmax[block / kNestedBlock]) + w.offset;
}

template <typename T>
inline void fill_table(const float* values, float scale, T* table) {
  for (int i = 0; i < 16; i += W) store(table + i, load(values + i) * scale);
}

template <typename T>
void dequantize_part(const Nf4View& w, int64_t begin, int64_t end, T* out) {
  if (begin == end) return;
  alignas(64) T table[16];
  fill_table(w.values, scale_of(w, begin / w.block), table);
  for (int64_t i = begin; i < end; i++) out[i - begin] = table[w.codes[i / 2] >> (i % 2 ? 0 : 4) & 15];
}

#if defined(__AVX2__)
inline void codes_of(const uint8_t* packed, __m128i* first, __m128i* second) {
  __m128i both = _mm_loadu_si128((const __m128i*)packed), mask = _mm_set1_epi8(15);
  __m128i high = _mm_and_si128(_mm_srli_epi16(both, 4), mask), low = _mm_and_si128(both, mask);
  *first = _mm_unpacklo_epi8(high, low);
  *second = _mm_unpackhi_epi8(high, low);
}

// A table of 16 two-byte values as two byte shuffles.
inline void dequantize_block(const uint8_t* packed, const Nf4View& w, float scale, bf16* out) {
  alignas(64) bf16 table[16];
  fill_table(w.values, scale, table);
  __m128i a = _mm_load_si128((const __m128i*)table), b = _mm_load_si128((const __m128i*)table + 1);
  __m128i byte = _mm_set1_epi16(255);
  __m128i low = _mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte));
  __m128i high = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
  for (int64_t at = 0; at < w.block; at += kPiece) {
    __m128i codes[2];
    codes_of(packed + at / 2, codes, codes + 1);
    for (int i = 0; i < 2; i++) {
      __m128i l = _mm_shuffle_epi8(low, codes[i]), h = _mm_shuffle_epi8(high, codes[i]);
      __m128i* to = (__m128i*)(out + at + 16 * i);
      _mm_storeu_si128(to, _mm_unpacklo_epi8(l, h));
      _mm_storeu_si128(to + 1, _mm_unpackhi_epi8(l, h));
    }
  }
}

// A table of 16 four-byte values as two permutes and a choice by the code's top bit.
inline void dequantize_block(const uint8_t* packed, const Nf4View& w, float scale, float* out) {
  __m256 factor = _mm256_set1_ps(scale);
  __m256 below = _mm256_mul_ps(_mm256_loadu_ps(w.values), factor);
  __m256 above = _mm256_mul_ps(_mm256_loadu_ps(w.values + 8), factor);
  for (int64_t at = 0; at < w.block; at += kPiece) {
    __m128i codes[2];
    codes_of(packed + at / 2, codes, codes + 1);
    for (int i = 0; i < 4; i++) {
      __m128i eight = i % 2 ? _mm_srli_si128(codes[i / 2], 8) : codes[i / 2];
      __m256i code = _mm256_cvtepu8_epi32(eight);
      __m256 top = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
      __m256 value = _mm256_blendv_ps(_mm256_permutevar8x32_ps(below, code), _mm256_permutevar8x32_ps(above, code), top);
      _mm256_storeu_ps(out + at + 8 * i, value);
    }
  }
}
#else
template <typename T>
inline void dequantize_block(const uint8_t* packed, const Nf4View& w, float scale, T* out) {
  alignas(64) T table[16];
  fill_table(w.values, scale, table);
  for (int64_t i = 0; i < w.block / 2; i++) {
    out[2 * i] = table[packed[i] >> 4];
    out[2 * i + 1] = table[packed[i] & 15];
  }
}
#endif

template <typename T>
void dequantize(const Nf4View& w, int64_t begin, int64_t end, T* out) {
  const int64_t block = w.block, each = kTask / block;
  int64_t first = (begin + block - 1) / block, last = end / block;  // whole blocks
  if (first > last) return dequantize_part(w, begin, end, out);     // inside one block
  dequantize_part(w, begin, first * block, out);
  parallel((last - first + each - 1) / each, [&](int64_t task) {
    int64_t stop = min_of(last, first + (task + 1) * each);
    for (int64_t b = first + task * each; b < stop; b++)
      dequantize_block(w.codes + b * block / 2, w, scale_of(w, b), out + (b * block - begin));
  });
  dequantize_part(w, last * block, end, out + (last * block - begin));
}

}  // namespace

void nf4_quantize(const void* x, bool wide, int64_t n, const Nf4Format& format, uint8_t* codes, float* absmax) {
  if (wide) return quantize((const float*)x, n, format, codes, absmax);
  quantize((const bf16*)x, n, format, codes, absmax);
}

void nf4_quantize_scales(const float* absmax, float offset, int64_t blocks, const uint8_t* nearest_code,
                         uint8_t* codes, float* nested_absmax) {
  parallel((blocks + kNestedBlock - 1) / kNestedBlock, [&](int64_t nested) {
    int64_t start = nested * kNestedBlock, stop = min_of(blocks, start + kNestedBlock);
    float most = 0.0f;
    for (int64_t b = start; b < stop; b++) {
      float magnitude = fabsf(absmax[b] - offset);
      most = magnitude > most ? magnitude : most;
    }
    nested_absmax[nested] = most;
    float inverse = 1.0f / most;
    for (int64_t b = start; b < stop; b++) {
      float scaled = rounded((absmax[b] - offset) * inverse);
      scaled = scaled < -1.0f ? -1.0f : scaled > 1.0f ? 1.0f : scaled;
      double point = double(rounded(scaled + 1.0f) * 0.5f) * 65535.0 + 0.5;  // exact; rounded once, as one fp32 fma
      codes[b] = most > 0.0f ? nearest_code[int32_t(float(point))] : 0;
    }
  });
}

void nf4_dequantize(const Nf4View& weight, int64_t begin, int64_t end, void* out, bool wide) {
  if (wide) return dequantize(weight, begin, end, (float*)out);
  dequantize(weight, begin, end, (bf16*)out);
}

}  // namespace tunegate::TUNEGATE_LEVEL
