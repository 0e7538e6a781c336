// Products of very few rows (decoding): every weight is read once, in its own layout, and multiplied with all rows.
//
// Four rows of w at a time, in pieces of k that fit the first-level cache (bf16 and NF4 are decoded there), against
// three rows of x; each output keeps one vector of partial sums that is added up at the end. Only (n, k) weights.
#pragma once
#include "gemm_weights.h"
#include "pool.h"

namespace tunegate::TUNEGATE_LEVEL {
namespace {

constexpr int64_t SMALL_ROWS = 16;
constexpr int64_t SMALL_CHUNK = 1024;

inline bool is_small(const GemmProduct& p) {
  bool fits = p.m <= SMALL_ROWS;
  for (int t = 0; t < p.terms; t++) fits = fits && !p.term[t].w_is_kn && !p.term[t].x_is_km;
  return fits;
}

// acc[4][SMALL_ROWS] += the products of 4 rows of w and ROWS of x over k, a multiple of W.
template <int ROWS, typename T>
inline void dots(const T* const* w, const float* x, int64_t x_stride, int64_t k, vfloat (*acc)[SMALL_ROWS]) {
  vfloat sums[4][ROWS];
  for (int j = 0; j < 4; j++)
    for (int r = 0; r < ROWS; r++) sums[j][r] = acc[j][r];
  for (int64_t i = 0; i < k; i += W)
    for (int j = 0; j < 4; j++) {
      vfloat values = load(w[j] + i);
      for (int r = 0; r < ROWS; r++) sums[j][r] += values * load(x + r * x_stride + i);
    }
  for (int j = 0; j < 4; j++)
    for (int r = 0; r < ROWS; r++) acc[j][r] = sums[j][r];
}

// x (m, k) as fp32 rows of up(k, W) floats, zeros past k.
inline void widen_x(const GemmTerm& t, int64_t m, float* to) {
  int64_t padded = (t.k + W - 1) / W * W;
  for (int64_t r = 0; r < m; r++, to += padded) {
    if (t.x_type == kBf16)
      widen((const bf16*)t.x + r * t.x_stride, t.k, to);
    else if (t.k)  // an empty product's x may be null
      memcpy(to, (const float*)t.x + r * t.x_stride, size_t(t.k) * 4);
    for (int64_t k = t.k; k < padded; k++) to[k] = 0.0f;
  }
}

// acc += all m rows against four rows of w over k, a multiple of W.
template <typename T>
inline void all_dots(const T* const* w, const float* x, int64_t x_stride, int64_t m, int64_t k,
                     vfloat (*acc)[SMALL_ROWS]) {
  int64_t r = 0;
  for (; r + 3 <= m; r += 3) dots<3>(w, x + r * x_stride, x_stride, k, (vfloat(*)[SMALL_ROWS])(&acc[0][r]));
  if (m - r == 2) dots<2>(w, x + r * x_stride, x_stride, k, (vfloat(*)[SMALL_ROWS])(&acc[0][r]));
  if (m - r == 1) dots<1>(w, x + r * x_stride, x_stride, k, (vfloat(*)[SMALL_ROWS])(&acc[0][r]));
}

inline void small_term(const GemmTerm& t, int64_t m, int64_t n0, int64_t some, const float* x,
                       vfloat (*acc)[SMALL_ROWS]) {
  alignas(64) float buffer[4][SMALL_CHUNK];
  int64_t padded = (t.k + W - 1) / W * W, start = 0;
  if (t.w_type == kBf16 && m <= 3) {  // widened in registers; a rest of k goes the general way
    const bf16* w[4];
    for (int64_t j = 0; j < 4; j++) w[j] = (const bf16*)t.w + (n0 + min_of(j, some - 1)) * t.w_stride;
    start = t.k / W * W;
    all_dots(w, x, padded, m, start, acc);
  }
  for (int64_t k0 = start; k0 < t.k; k0 += SMALL_CHUNK) {
    int64_t kc = min_of(SMALL_CHUNK, t.k - k0), whole = (kc + W - 1) / W * W;
    const float* w[4];
    for (int64_t j = 0; j < 4; j++) {
      w[j] = j < some ? read_row(t, n0 + j, k0, kc, buffer[j]) : w[0];
      if (whole == kc || j >= some) continue;
      if (w[j] != buffer[j]) memcpy(buffer[j], w[j], size_t(kc) * 4);
      for (int64_t k = kc; k < whole; k++) buffer[j][k] = 0.0f;
      w[j] = buffer[j];
    }
    all_dots(w, x + k0, padded, m, whole, acc);
  }
}

inline void small_out(const GemmProduct& p, int64_t r, int64_t column, float value) {
  value = value * p.alpha;
  if (p.column_scale) value = value * p.column_scale[column];
  if (p.bias)
    value = value + (p.bias_type == kBf16 ? to_float(((const bf16*)p.bias)[column]) : ((const float*)p.bias)[column]);
  int64_t at = r * p.out_stride + column, add_at = r * p.add_stride + column;
  if (p.out_type == kBf16)
    set((bf16*)p.out + at, p.add ? value + to_float(((const bf16*)p.add)[add_at]) : value);
  else
    set((float*)p.out + at, p.add ? value + ((const float*)p.add)[add_at] : value);
}

// Columns begin .. end of the product.
inline void small_task(const GemmProduct& p, int64_t begin, int64_t end) {
  int64_t floats = 0;
  for (int t = 0; t < p.terms; t++) floats += (p.term[t].k + W - 1) / W * W * p.m;
  float* x = (float*)scratch(floats * 4, 0);
  float* each[kMostTerms];
  for (int t = 0; t < p.terms; t++) {
    each[t] = x;
    widen_x(p.term[t], p.m, x);
    x += (p.term[t].k + W - 1) / W * W * p.m;
  }
  for (int64_t n0 = begin; n0 < end; n0 += 4) {
    vfloat acc[4][SMALL_ROWS];
    for (int j = 0; j < 4; j++)
      for (int64_t r = 0; r < p.m; r++) acc[j][r] = vfloat{};
    int64_t some = min_of(4, end - n0);
    for (int t = 0; t < p.terms; t++) small_term(p.term[t], p.m, n0, some, each[t], acc);
    for (int64_t j = 0; j < some; j++)
      for (int64_t r = 0; r < p.m; r++) small_out(p, r, n0 + j, sum(acc[j][r]));
  }
}

}  // namespace
}  // namespace tunegate::TUNEGATE_LEVEL
