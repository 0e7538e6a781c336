// Products of bf16 on machines that have instructions for them: AMX tiles or AVX-512 dot products, fp32 accumulators.
//
// The right factor lies in the pair layout of both instructions (Intel 64 manual, TDPBF16PS and VDPBF16PS): for every
// 32 k two tiles of 16 columns, each 16 rows of (k, k + 1) pairs. The left factor lies as it is, k inside.
#pragma once
#include "level.h"

#if defined(TUNEGATE_AMX) || defined(TUNEGATE_AVX512BF16)
#define TUNEGATE_HAS_BF16
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#endif

namespace tunegate::TUNEGATE_LEVEL {
namespace {

#ifdef TUNEGATE_HAS_BF16
constexpr bool HAS_BF16 = true;
#else
constexpr bool HAS_BF16 = false;
#endif
constexpr int STEP = 32;         // k of one tile
constexpr int TILE = 16 * STEP;  // elements of one tile
constexpr int COLUMNS = 32;      // of the right factor, and of the result

#ifdef TUNEGATE_HAS_BF16
static_assert(W == 16, "the tiles are 16 columns");

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

// to[2 i], to[2 i + 1] = a[i], b[i] for 16 i.
inline void interleave(const bf16* a, const bf16* b, bf16* to) {
  vhalf first, second;
  memcpy(&first, a, sizeof first), memcpy(&second, b, sizeof second);
  vuint pairs = __builtin_convertvector(first, vuint) | __builtin_convertvector(second, vuint) << 16;
  memcpy(to, &pairs, sizeof pairs);
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
    TILE_LOAD(0, c, COLUMNS * 4);
    TILE_LOAD(1, c + 16, COLUMNS * 4);
    if (two) {
      TILE_LOAD(2, c + 16 * COLUMNS, COLUMNS * 4);
      TILE_LOAD(3, c + 16 * COLUMNS + 16, COLUMNS * 4);
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
  TILE_STORE(0, c, COLUMNS * 4);
  TILE_STORE(1, c + 16, COLUMNS * 4);
  if (two) {
    TILE_STORE(2, c + 16 * COLUMNS, COLUMNS * 4);
    TILE_STORE(3, c + 16 * COLUMNS + 16, COLUMNS * 4);
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
  for (int64_t r0 = 0; r0 < rows; r0 += 8, x += 8 * x_stride, c += 8 * COLUMNS) {
    vfloat acc[8][2];
    for (int r = 0; r < 8; r++)
      for (int v = 0; v < 2; v++) acc[r][v] = first ? vfloat{} : load(c + r * COLUMNS + v * W);
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
      for (int v = 0; v < 2; v++) store(c + r * COLUMNS + v * W, acc[r][v]);
  }
}

#else
inline void open_tiles() {}
inline void close_tiles() {}
#endif

}  // namespace
}  // namespace tunegate::TUNEGATE_LEVEL
