// bf16 activations on machines with bf16 instructions (bf16_units.h): packing for them.
//
// A packed panel holds 32 columns of w in the units' pair layout: for every 32 k two tiles. fp32 and quantized weights are
// rounded to bf16 on the way. x is read in place where its tile is whole, else from a copy padded with zeros.
#pragma once
#include "bf16_units.h"
#include "gemm_weights.h"

namespace tunegate::TUNEGATE_LEVEL {
namespace {

constexpr int KC_BF16 = 512;

inline bool takes_bf16(const GemmTerm& t) { return HAS_BF16 && t.x_type == kBf16; }

#ifdef TUNEGATE_HAS_BF16
static_assert(NR == COLUMNS, "a packed panel is what the units multiply with");

// n <= CHUNK values of a stored row as bf16, followed by zeros up to a multiple of STEP.
inline const bf16* read_row_bf16(const GemmTerm& t, int64_t row, int64_t column, int64_t n, bf16* buffer) {
  if (t.w_type == kBf16) {
    const bf16* from = (const bf16*)t.w + row * t.w_stride + column;
    if (n % STEP == 0) return from;
    memcpy(buffer, from, size_t(n) * 2);
  } else {
    alignas(64) float wide[CHUNK];
    const float* from = read_row(t, row, column, n, wide);
    int64_t i = 0;
    for (; i + W <= n; i += W) store(buffer + i, load(from + i));
    for (; i < n; i++) set(buffer + i, from[i]);
  }
  for (int64_t i = n; i % STEP; i++) buffer[i].bits = 0;
  return buffer;
}

inline void pack_panel_nk_bf16(const GemmTerm& t, int64_t n, int64_t n0, int64_t k0, int64_t kc, bf16* to) {
  alignas(64) bf16 buffer[NR][CHUNK];
  alignas(64) static const bf16 zeros[CHUNK] = {};
  for (int64_t c = 0; c < kc; c += CHUNK) {
    int64_t width = min_of(CHUNK, kc - c);
    const bf16* rows[NR];
    for (int r = 0; r < NR; r++)
      rows[r] = n0 + r < n ? read_row_bf16(t, n0 + r, k0 + c, width, buffer[r]) : zeros;
    for (int64_t k = 0; k < width; k += STEP, to += 2 * TILE) {
      transpose_pairs(rows, to), transpose_pairs(rows + 16, to + TILE);
      for (int r = 0; r < NR; r++) rows[r] += STEP;
    }
  }
}

inline void pack_unit_kn_bf16(const GemmTerm& t, int64_t n, int64_t n0, int64_t k0, int64_t kc, bf16* to) {
  alignas(64) bf16 buffer[2][PACK] = {};
  alignas(64) static const bf16 zeros[PACK] = {};
  int64_t width = min_of(PACK, n - n0), padded = (kc + STEP - 1) / STEP * STEP;
  for (int64_t k = 0; k < padded; k += 2) {
    const bf16* row[2];
    for (int i = 0; i < 2; i++) {
      row[i] = k + i < kc ? read_row_bf16(t, k0 + k + i, n0, width, buffer[i]) : zeros;
      if (width < PACK && row[i] != zeros && row[i] != buffer[i]) {
        memcpy(buffer[i], row[i], size_t(width) * 2);
        row[i] = buffer[i];
      }
    }
    bf16* out = to + k / STEP * 2 * TILE + k % STEP / 2 * 32;
    for (int c = 0; c < PACK; c += 16)
      interleave(row[0] + c, row[1] + c, out + c / NR * NR * padded + c % NR / 16 * TILE);
  }
}

inline void pack_unit_bf16(const GemmTerm& t, int64_t n, int64_t n0, int64_t k0, int64_t kc, bf16* to) {
  if (t.w_is_kn) return pack_unit_kn_bf16(t, n, n0, k0, kc, to);
  int64_t padded = (kc + STEP - 1) / STEP * STEP;
  for (int64_t c = 0; c < min_of(PACK, n - n0); c += NR) pack_panel_nk_bf16(t, n, n0 + c, k0, kc, to + c * padded);
}

// x as `rows` padded to 16, k padded to STEP, zeros outside.
inline void pack_rows_bf16(const GemmTerm& t, int64_t m0, int64_t rows, int64_t k0, int64_t kc, bf16* to) {
  int64_t padded = (kc + STEP - 1) / STEP * STEP, all = (rows + 15) / 16 * 16;
  const bf16* x = (const bf16*)t.x;
  if (!t.x_is_km) {
    for (int64_t r = 0; r < all; r++, to += padded) {
      int64_t kept = r < rows ? kc : 0;
      if (kept) memcpy(to, x + (m0 + r) * t.x_stride + k0, size_t(kept) * 2);
      memset((void*)(to + kept), 0, size_t(padded - kept) * 2);
    }
    return;
  }
  alignas(64) bf16 row[2][16] = {}, pairs[16][32], square[16][32];
  const bf16* from[16];
  for (int i = 0; i < 16; i++) from[i] = pairs[i];
  for (int64_t k = 0; k < padded; k += STEP)
    for (int64_t r = 0; r < all; r += 16) {
      size_t some = size_t(min_of(16, rows - r)) * 2;
      memset((void*)row, 0, sizeof row);
      for (int64_t i = 0; i < STEP; i += 2) {
        for (int64_t j = 0; j < 2; j++) {
          if (k + i + j < kc)
            memcpy(row[j], x + (k0 + k + i + j) * t.x_stride + m0 + r, some);
          else
            memset((void*)row[j], 0, sizeof row[j]);
        }
        interleave(row[0], row[1], pairs[i / 2]);
      }
      transpose_pairs(from, square[0]);
      for (int64_t i = 0; i < 16; i++) memcpy(to + (r + i) * padded + k, square[i], STEP * 2);
    }
}
#endif

}  // namespace
}  // namespace tunegate::TUNEGATE_LEVEL
