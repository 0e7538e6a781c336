// bf16 activations on machines with bf16 instructions: AMX tiles or AVX-512 dot products, fp32 accumulators.
//
// A packed panel holds 32 columns of w in the pair layout of both instructions (Intel 64 manual, TDPBF16PS and
// VDPBF16PS): for every 32 k two tiles of 16 columns, each 16 rows of (k, k + 1) pairs. fp32 and NF4 weights are
// rounded to bf16 on the way. x is read in place where its tile is whole, else from a copy padded with zeros.
#pragma once
#include "gemm_weights.h"

#if defined(TUNEGATE_AMX) || defined(TUNEGATE_AVX512BF16)
#define TUNEGATE_HAS_BF16
#endif

namespace tunegate::TUNEGATE_LEVEL {
namespace {

#ifdef TUNEGATE_HAS_BF16
constexpr bool HAS_BF16 = true;
#else
constexpr bool HAS_BF16 = false;
#endif
constexpr int KC_BF16 = 512;
constexpr int STEP = 32;          // k of one tile
constexpr int TILE = 16 * STEP;   // elements of one tile

inline bool takes_bf16(const GemmTerm& t) { return HAS_BF16 && t.x_type == kBf16; }

#ifdef TUNEGATE_HAS_BF16
static_assert(NR == 32 && W == 16, "the tiles are 16 columns");

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

// 4 x 4 blocks of pairs of a 16 x 16 square: to[i][j] = from[j][i]; a pair moves as one fp32.
inline void transpose_pairs(const bf16* const* from, bf16* to) {
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 16; j += 4) {
      quad a = load4((const float*)(from[j] + 2 * i)), b = load4((const float*)(from[j + 1] + 2 * i));
      quad c = load4((const float*)(from[j + 2] + 2 * i)), d = load4((const float*)(from[j + 3] + 2 * i));
      transpose4(a, b, c, d);
      float* out = (float*)(to + i * 32 + 2 * j);
      store4(out, a), store4(out + 16, b), store4(out + 32, c), store4(out + 48, d);
    }
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

// to[2 i], to[2 i + 1] = a[i], b[i] for 16 i.
inline void interleave(const bf16* a, const bf16* b, bf16* to) {
  vhalf first, second;
  memcpy(&first, a, sizeof first), memcpy(&second, b, sizeof second);
  vuint pairs = __builtin_convertvector(first, vuint) | __builtin_convertvector(second, vuint) << 16;
  memcpy(to, &pairs, sizeof pairs);
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

#ifdef TUNEGATE_AMX
#ifdef TUNEGATE_EMULATED
struct Tiles {
  vfloat rows[8][16];
};
inline Tiles& tiles() {
  static thread_local Tiles own;
  return own;
}
#define TILE_ZERO(t) memset(tiles().rows[t], 0, 1024)
#define TILE_LOAD(t, from, stride) \
  for (int r_ = 0; r_ < 16; r_++) memcpy(&tiles().rows[t][r_], (const char*)(from) + r_ * (stride), 64)
#define TILE_STORE(t, to, stride) \
  for (int r_ = 0; r_ < 16; r_++) memcpy((char*)(to) + r_ * (stride), &tiles().rows[t][r_], 64)
#define TILE_MULTIPLY(c, a, b) emulate_multiply(tiles().rows[c], tiles().rows[a], tiles().rows[b])
inline void emulate_multiply(vfloat* c, const vfloat* a, const vfloat* b) {
  for (int r = 0; r < 16; r++) {
    bf16 x[32];
    memcpy(x, &a[r], 64);
    for (int k = 0; k < 16; k++) {
      vuint pairs = (vuint)b[k];
      c[r] += (vfloat)(pairs << 16) * to_float(x[2 * k]) + (vfloat)(pairs & 0xffff0000u) * to_float(x[2 * k + 1]);
    }
  }
}
inline void open_tiles() {}
inline void close_tiles() {}
#else
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, from, stride) _tile_loadd(t, from, stride)
#define TILE_STORE(t, to, stride) _tile_stored(t, to, stride)
#define TILE_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)
// Eight tiles of 16 rows of 64 bytes (palette 1). Static: GCC 12 does not order a configuration on the stack.
inline void open_tiles() {
  alignas(64) static const uint8_t shape[64] = {1,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0,
                                                64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0,
                                                0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0,
                                                16, 16, 16, 16, 16, 16, 16, 16};
  _tile_loadconfig(shape);
}
inline void close_tiles() { _tile_release(); }
#endif

// c[rows <= 32][32] (= or +=) x @ w over `steps` steps of k; x_stride in elements.
inline void micro_bf16(const bf16* x, int64_t x_stride, int64_t rows, const bf16* w, int64_t steps, float* c,
                       bool first) {
  const int64_t bytes = x_stride * 2;
  const bool two = rows > 16;
  asm volatile("" ::: "memory");  // GCC 12's tile loads do not say that they read memory
  if (first) {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
  } else {
    TILE_LOAD(0, c, NR * 4);
    TILE_LOAD(1, c + 16, NR * 4);
    if (two) {
      TILE_LOAD(2, c + 16 * NR, NR * 4);
      TILE_LOAD(3, c + 16 * NR + 16, NR * 4);
    }
  }
  for (int64_t s = 0; s < steps; s++, x += STEP, w += 2 * TILE) {
    TILE_LOAD(6, w, 64);
    TILE_LOAD(7, w + TILE, 64);
    TILE_LOAD(4, x, bytes);
    TILE_MULTIPLY(0, 4, 6);
    TILE_MULTIPLY(1, 4, 7);
    if (two) {
      TILE_LOAD(5, x + 16 * x_stride, bytes);
      TILE_MULTIPLY(2, 5, 6);
      TILE_MULTIPLY(3, 5, 7);
    }
  }
  TILE_STORE(0, c, NR * 4);
  TILE_STORE(1, c + 16, NR * 4);
  if (two) {
    TILE_STORE(2, c + 16 * NR, NR * 4);
    TILE_STORE(3, c + 16 * NR + 16, NR * 4);
  }
  asm volatile("" ::: "memory");
}

#elif defined(TUNEGATE_AVX512BF16)
inline void open_tiles() {}
inline void close_tiles() {}

// sum + the products of 16 pairs of w with one pair of x.
inline vfloat dot_pairs(vfloat sum, uint32_t x, const bf16* w) {
#ifdef TUNEGATE_EMULATED
  vuint pairs;
  memcpy(&pairs, w, sizeof pairs);
  vuint both = vuint{} + x;
  return sum + (vfloat)(pairs << 16) * (vfloat)(both << 16) + (vfloat)(pairs & 0xffff0000u) * (vfloat)(both & 0xffff0000u);
#else
  return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(x)),
                                  (__m512bh)_mm512_loadu_si512(w));
#endif
}

// As above, eight rows at a time.
inline void micro_bf16(const bf16* x, int64_t x_stride, int64_t rows, const bf16* w, int64_t steps, float* c,
                       bool first) {
  for (int64_t r0 = 0; r0 < rows; r0 += 8, x += 8 * x_stride, c += 8 * NR) {
    vfloat acc[8][2];
    for (int r = 0; r < 8; r++)
      for (int v = 0; v < 2; v++) acc[r][v] = first ? vfloat{} : load(c + r * NR + v * W);
    for (int64_t s = 0; s < steps; s++)
      for (int64_t k = 0; k < 16; k++) {
        const bf16* pairs = w + s * 2 * TILE + k * 32;
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) {
          uint32_t value;
          memcpy(&value, x + r * x_stride + s * STEP + 2 * k, 4);
          acc[r][0] = dot_pairs(acc[r][0], value, pairs);
          acc[r][1] = dot_pairs(acc[r][1], value, pairs + TILE);
        }
      }
    for (int r = 0; r < 8; r++)
      for (int v = 0; v < 2; v++) store(c + r * NR + v * W, acc[r][v]);
  }
}

#else
inline void open_tiles() {}
inline void close_tiles() {}
#endif

}  // namespace
}  // namespace tunegate::TUNEGATE_LEVEL
