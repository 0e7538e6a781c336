// The fp32 microkernel: MR rows by NR columns of accumulators in registers, over one block of k.
//
// Both operands are packed (Goto & van de Geijn 2008; Van Zee & van de Geijn 2015, BLIS): a sliver of x gives MR
// consecutive values per k, a panel of w NR. Rows and columns past the edge are zeros, so that there is one kernel.
#pragma once
#include "gemm_weights.h"

namespace tunegate::TUNEGATE_LEVEL {
namespace {

constexpr int KC = 384;  // longest block of k: a panel of w (24 KB on AVX2) fits the first-level cache

// c[MR][NR] (= or +=) a @ b. row_step and k_step address a: (1, MR) packed, (stride, 1) in place.
template <int VECTORS>
inline void micro(const float* a, int64_t row_step, int64_t k_step, const float* b, int64_t kc, float* c, bool first) {
  vfloat acc[MR][VECTORS] = {};
  for (int64_t k = 0; k < kc; k++) {
    vfloat w[VECTORS];
    for (int v = 0; v < VECTORS; v++) w[v] = load(b + k * NR + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < MR; r++) {
      vfloat x = a[r * row_step] - vfloat{};
      for (int v = 0; v < VECTORS; v++) acc[r][v] += x * w[v];
    }
    a += k_step;
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; r++)
    for (int v = 0; v < VECTORS; v++) {
      float* to = c + r * NR + v * W;
      store(to, first ? acc[r][v] : load(to) + acc[r][v]);
    }
}

// x (m, k): `rows` <= MR rows from x, kc columns, to a sliver.
template <typename T>
inline void pack_sliver_mk(const T* x, int64_t stride, int64_t rows, int64_t kc, float* to) {
  alignas(64) static const T zeros[KC] = {};
  const T* row[MR];
  for (int r = 0; r < MR; r++) row[r] = r < rows ? x + r * stride : zeros;
  int64_t k = 0;
  for (; k + 4 <= kc; k += 4) {
    float* out = to + k * MR;
    int r = 0;
#pragma GCC unroll 4
    for (; r + 4 <= MR; r += 4) {
      quad a = load4(row[r] + k), b = load4(row[r + 1] + k), c = load4(row[r + 2] + k), d = load4(row[r + 3] + k);
      transpose4(a, b, c, d);
      store4(out + r, a), store4(out + MR + r, b), store4(out + 2 * MR + r, c), store4(out + 3 * MR + r, d);
    }
    quad a = load4(row[r] + k), b = load4(row[r + 1] + k);  // MR is 4 i + 2
    quad low = __builtin_shufflevector(a, b, 0, 4, 1, 5), high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    memcpy(out + r, &low, 8), memcpy(out + MR + r, (const char*)&low + 8, 8);
    memcpy(out + 2 * MR + r, &high, 8), memcpy(out + 3 * MR + r, (const char*)&high + 8, 8);
  }
  for (; k < kc; k++)
    for (int r = 0; r < MR; r++) to[k * MR + r] = to_float(row[r][k]);
}

// x stored (k, m): `rows` <= MR columns from x, kc rows, to a sliver.
template <typename T>
inline void pack_sliver_km(const T* x, int64_t stride, int64_t rows, int64_t kc, float* to) {
  for (int64_t k = 0; k < kc; k++, x += stride, to += MR) {
    if (rows == MR) {
      for (int r = 0; r < MR; r++) to[r] = to_float(x[r]);
    } else {
      for (int r = 0; r < MR; r++) to[r] = r < rows ? to_float(x[r]) : 0.0f;
    }
  }
}

template <typename T>
inline void pack_rows(const GemmTerm& t, int64_t m0, int64_t rows, int64_t k0, int64_t kc, float* to) {
  for (int64_t r = 0; r < rows; r += MR, to += MR * kc) {
    int64_t some = min_of(MR, rows - r);
    if (t.x_is_km)
      pack_sliver_km((const T*)t.x + k0 * t.x_stride + m0 + r, t.x_stride, some, kc, to);
    else
      pack_sliver_mk((const T*)t.x + (m0 + r) * t.x_stride + k0, t.x_stride, some, kc, to);
  }
}

}  // namespace
}  // namespace tunegate::TUNEGATE_LEVEL
