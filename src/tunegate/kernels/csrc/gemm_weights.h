// Reading weights as fp32, whatever they are stored as, and laying them out for the fp32 microkernel.
//
// A packed panel holds NR columns of the product (rows of an (n, k) weight): for each k, NR consecutive floats. Codes
// and bf16 weights are decoded in pieces that stay in the first-level cache; no decoded copy of a matrix ever exists.
#pragma once
#include "gemm.h"
#include "int8.h"
#include "level.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tunegate::TUNEGATE_LEVEL {
namespace {

constexpr int NR = 2 * W;            // columns of a panel
constexpr int MR = W == 16 ? 14 : 6;  // rows of the microkernel: MR * 2 accumulators fill the register file
constexpr int PACK = 64;             // columns that are packed together
constexpr int CHUNK = 64;            // k that are decoded together

// n values to fp32.
template <typename T>
inline void widen(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  for (; i < n; i++) to[i] = to_float(from[i]);
}

inline float block_scale(const GemmTerm& t, int64_t block) {
  if (t.absmax) return t.absmax[block];
  float scale = t.nested_code[t.absmax_codes[block]] * t.nested_absmax[block >> 8];
  __asm__("" : "+m"(scale));  // rounded here: fused with the addition in one place only, kernels would not agree
  return scale + t.offset;
}

// The sixteen values of a format in registers, and 16 codes of 8 bytes as values times scale.
#if defined(__AVX512F__)
struct Values {
  __m512 all;
  explicit Values(const float* values) : all(_mm512_loadu_ps(values)) {}
  vfloat of(vuint codes) const {  // the lowest four bits of each count
    return (vfloat)_mm512_maskz_permutexvar_ps(__mmask16(0xffff), (__m512i)codes, all);
  }
};

inline void decode16(const Values& values, const uint8_t* codes, float scale, float* to) {
  __m128i bytes = _mm_loadl_epi64((const __m128i*)codes), low_bits = _mm_set1_epi8(15);
  __m128i order = _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(bytes, 4), low_bits), _mm_and_si128(bytes, low_bits));
  const __mmask16 all = 0xffff;  // the forms without a mask draw a false warning from GCC 12
  __m512 found = _mm512_maskz_permutexvar_ps(all, _mm512_maskz_cvtepu8_epi32(all, order), values.all);
  _mm512_storeu_ps(to, _mm512_mul_ps(found, _mm512_set1_ps(scale)));
}
#elif defined(__AVX2__)
struct Values {
  __m256 below, above;
  explicit Values(const float* values) : below(_mm256_loadu_ps(values)), above(_mm256_loadu_ps(values + 8)) {}
#if TUNEGATE_WIDTH == 8
  vfloat of(vuint codes) const {  // the lowest four bits of each count
    __m256i index = (__m256i)codes;
    return (vfloat)_mm256_blendv_ps(_mm256_permutevar8x32_ps(below, index), _mm256_permutevar8x32_ps(above, index),
                                    _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
#else
  vfloat of(vuint codes) const {  // emulation of a wider level
    float table[16], lanes[W];
    _mm256_storeu_ps(table, below), _mm256_storeu_ps(table + 8, above);
    for (int i = 0; i < W; i++) lanes[i] = table[codes[i] & 15];
    return load(lanes);
  }
#endif
};

inline void decode16(const Values& values, const uint8_t* codes, float scale, float* to) {
  __m128i bytes = _mm_loadl_epi64((const __m128i*)codes), low_bits = _mm_set1_epi8(15);
  __m128i order = _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(bytes, 4), low_bits), _mm_and_si128(bytes, low_bits));
  __m256 factor = _mm256_set1_ps(scale);
  for (int half = 0; half < 2; half++) {
    __m256i index = _mm256_cvtepu8_epi32(half ? _mm_srli_si128(order, 8) : order);
    __m256 found = _mm256_blendv_ps(_mm256_permutevar8x32_ps(values.below, index),
                                    _mm256_permutevar8x32_ps(values.above, index),
                                    _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
    _mm256_storeu_ps(to + 8 * half, _mm256_mul_ps(found, factor));
  }
}
#else
struct Values {
  float all[16];
  explicit Values(const float* values) { memcpy(all, values, sizeof all); }
  vfloat of(vuint codes) const {  // the lowest four bits of each count
    float lanes[W];
    for (int i = 0; i < W; i++) lanes[i] = all[codes[i] & 15];
    return load(lanes);
  }
};

inline void decode16(const Values& values, const uint8_t* codes, float scale, float* to) {
  for (int i = 0; i < 8; i++) {
    to[2 * i] = values.all[codes[i] >> 4] * scale;
    to[2 * i + 1] = values.all[codes[i] & 15] * scale;
  }
}
#endif

// n values of a 4-bit matrix from its flat index `at`.
inline void decode(const GemmTerm& t, int64_t at, int64_t n, float* to) {
  const uint8_t* codes = (const uint8_t*)t.w;
  const Values values(t.values);
  const int shift = t.block_shift;
  for (; shift >= 6 && n >= 64 && (at & 63) == 0; at += 64, to += 64, n -= 64) {
    float scale = block_scale(t, at >> shift);
    for (int i = 0; i < 64; i += 16) decode16(values, codes + ((at + i) >> 1), scale, to + i);
  }
  const int64_t block = int64_t(1) << shift;
  while (n > 0) {
    int64_t run = min_of(n, block - (at & (block - 1)));
    float scale = block_scale(t, at >> shift);
    int64_t i = 0;
    if ((at & 1) == 0)
      for (; i + 16 <= run; i += 16) decode16(values, codes + ((at + i) >> 1), scale, to + i);
    for (; i < run; i++) {
      int64_t flat = at + i;
      int code = flat & 1 ? codes[flat >> 1] & 15 : codes[flat >> 1] >> 4;
      to[i] = t.values[code] * scale;
    }
    at += run, to += run, n -= run;
  }
}

// n values of one row of an 8-bit matrix: rounded after each multiplication, as in every kernel that reads such codes.
template <typename T>
inline void decode_bytes(const int8_t* codes, int64_t n, float absmax, T* to) {
  typedef int8_t vbyte __attribute__((vector_size(W)));
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    vbyte some;
    memcpy(&some, codes + i, sizeof some);
    store(to + i, __builtin_convertvector(__builtin_convertvector(some, vint), vfloat) * absmax * kInt8Step);
  }
  for (; i < n; i++) set(to + i, float(codes[i]) * absmax * kInt8Step);
}

// n values of row `row` of the stored matrix from column `column`: in place if they are fp32, else in `buffer`.
inline const float* read_row(const GemmTerm& t, int64_t row, int64_t column, int64_t n, float* buffer) {
  int64_t at = row * t.w_stride + column;
  if (t.w_type == kFp32) return (const float*)t.w + at;
  if (t.w_type == kBf16)
    widen((const bf16*)t.w + at, n, buffer);
  else if (t.w_type == kInt8)
    decode_bytes((const int8_t*)t.w + at, n, t.absmax[row], buffer);
  else
    decode(t, at, n, buffer);
  return buffer;
}

// 16 bytes of each of W rows from k on as columns: to[i] has every row's value at k + i.
inline void columns_of(const float* const* rows, int64_t k, vfloat* to) {
  for (int i = 0; i < 4; i++) {
    quad parts[W / 4];
    for (int p = 0; p < W / 4; p++) parts[p] = load4(rows[4 * p + i] + k);
    to[i] = join(parts);
  }
  transpose4(to[0], to[1], to[2], to[3]);
}
inline void columns_of(const bf16* const* rows, int64_t k, vfloat* to) {
  vfloat pairs[4];  // of neighbours
  for (int i = 0; i < 4; i++) {
    quad parts[W / 4];
    for (int p = 0; p < W / 4; p++) memcpy(&parts[p], rows[4 * p + i] + k, 16);
    pairs[i] = join(parts);
  }
  transpose4(pairs[0], pairs[1], pairs[2], pairs[3]);
  for (int i = 0; i < 4; i++) {
    to[2 * i] = (vfloat)((vuint)pairs[i] << 16);
    to[2 * i + 1] = (vfloat)((vuint)pairs[i] & 0xffff0000u);
  }
}

// `count` values of each of `width` rows, W or NR, as [count][width].
template <typename T>
inline void pack_columns(const T* const* rows, int64_t width, int64_t count, float* to) {
  constexpr int STEP_K = 16 / sizeof(T);
  int64_t k = 0;
  for (; k + STEP_K <= count; k += STEP_K)
    for (int64_t r = 0; r < width; r += W) {
      vfloat columns[STEP_K];
      columns_of(rows + r, k, columns);
      for (int i = 0; i < STEP_K; i++) store(to + (k + i) * width + r, columns[i]);
    }
  for (; k < count; k++)
    for (int64_t r = 0; r < width; r++) to[k * width + r] = to_float(rows[r][k]);
}

// (n, k) weights: NR rows from `n0` (those past n are zeros), k0 .. k0 + kc, to a panel.
inline void pack_panel_nk(const GemmTerm& t, int64_t n, int64_t n0, int64_t k0, int64_t kc, float* to) {
  alignas(64) float buffer[NR][CHUNK];
  alignas(64) static const float zeros[CHUNK] = {};
  if (t.w_type == kBf16 && n0 + NR <= n) {
    const bf16* rows[NR];
    for (int r = 0; r < NR; r++) rows[r] = (const bf16*)t.w + (n0 + r) * t.w_stride + k0;
    return pack_columns(rows, NR, kc, to);
  }
  for (int64_t c = 0; c < kc; c += CHUNK) {
    int64_t width = min_of(CHUNK, kc - c);
    const float* rows[NR];
    for (int r = 0; r < NR; r++)
      rows[r] = n0 + r < n ? read_row(t, n0 + r, k0 + c, width, buffer[r]) : zeros;
    pack_columns(rows, NR, width, to + c * NR);
  }
}

// (k, n) weights: PACK columns from n0, k0 .. k0 + kc, to PACK / NR panels, each kc * NR floats.
inline void pack_unit_kn(const GemmTerm& t, int64_t n, int64_t n0, int64_t k0, int64_t kc, float* to) {
  alignas(64) float buffer[PACK] = {};
  int64_t width = min_of(PACK, n - n0);
  for (int64_t k = 0; k < kc; k++) {
    const float* row = read_row(t, k0 + k, n0, width, buffer);
    if (width < PACK && row != buffer) {
      memcpy(buffer, row, size_t(width) * 4);
      row = buffer;
    }
    for (int c = 0; c < PACK; c += NR) {
      float* out = to + c * kc + k * NR;
      store(out, load(row + c)), store(out + W, load(row + c + W));
    }
  }
}

// PACK columns of the product from n0 as PACK / NR panels; panels wholly past n are left alone.
inline void pack_unit(const GemmTerm& t, int64_t n, int64_t n0, int64_t k0, int64_t kc, float* to) {
  if (t.w_is_kn) return pack_unit_kn(t, n, n0, k0, kc, to);
  for (int64_t c = 0; c < min_of(PACK, n - n0); c += NR) pack_panel_nk(t, n, n0 + c, k0, kc, to + c * kc);
}

}  // namespace
}  // namespace tunegate::TUNEGATE_LEVEL
