// Products of few rows (decoding, short prompts): every weight is read once, row by row as it lies, against all rows of x
// at a time, while memory brings the rows after them.
//
// x is packed in panels of up to NR rows, k by k, so that it fills the vector lanes; some rows of w are broadcast: fp32
// in place, bf16 widened in registers for one panel, anything else and more panels from a buffer of the first-level
// cache. For the fewest rows it is w that fills the lanes: W rows at a time are transposed in registers, bf16 by pairs.
// Every output is one sum over k in order, cut into the same blocks as in the products of many rows: a row's result is
// the same bytes whatever shares its product. Only (n, k) weights.
#pragma once
#include "gemm_fp32.h"

namespace tunegate::TUNEGATE_LEVEL {
namespace {

constexpr int64_t SMALL_ROWS = 256;
constexpr int64_t FEW_ROWS = 16;  // up to here where the machine's bf16 units would take more
constexpr int64_t FEWEST = 5;     // with so few rows of x, most of its lanes would be empty
constexpr int LINES = 16;         // rows of w then
constexpr int FETCHED = 16;       // k between two looks ahead
constexpr int ONE = 2 * MR, TWO = MR;  // rows of w against one and two vectors of x: as many accumulators as MR by NR

inline bool is_small(const GemmProduct& p, bool bf16_units) {
  bool fits = p.m <= (bf16_units ? FEW_ROWS : SMALL_ROWS);
  for (int t = 0; t < p.terms; t++) fits = fits && !p.term[t].w_is_kn && !p.term[t].x_is_km;
  return fits;
}

// x in panels of NR rows; the last one may be of W.
inline int64_t small_panels(int64_t m) { return (m + NR - 1) / NR; }
inline int64_t small_width(int64_t m, int64_t panel) { return m - panel * NR <= W ? W : NR; }

// Rows m0 .. m0 + width - 1 of x, k0 .. k0 + kc, as [kc][width]; zeros past the last row.
template <typename T>
inline void pack_small_x(const GemmTerm& t, int64_t m0, int64_t rows, int64_t width, float* to) {
  alignas(64) static const T zeros[CHUNK] = {};
  for (int64_t c = 0; c < t.k; c += CHUNK) {
    const T* row[NR];
    for (int64_t r = 0; r < width; r++) row[r] = r < rows ? (const T*)t.x + (m0 + r) * t.x_stride + c : zeros;
    pack_columns(row, width, min_of(CHUNK, t.k - c), to + c * width);
  }
}

inline vfloat splat_low(const float* at) { return splat(*at); }
// Of bf16 a value and its neighbour are broadcast as one float, a load without a shuffle, and the neighbour shifted out:
// not for a matrix's last value.
inline vfloat splat_low(const bf16* at) {
  float pair;
  memcpy(&pair, at, 4);
  return (vfloat)((vuint)splat(pair) << 16);
}

// What memory has to bring while some rows of w are multiplied: as much of the rows after them as this block of k is of
// theirs. It may lie past the last row. A machine's own prefetching does not keep up, the reads of one row are too short
// for it.
struct Ahead {
  const char* at = nullptr;
  int64_t half_bytes = 0;  // a k

  Ahead() = default;
  Ahead(const GemmTerm& t, int64_t n0, int64_t rows, int64_t k0) {
    half_bytes = rows * (t.w_type == kFp32 ? 8 : t.w_type == kBf16 ? 4 : t.w_type == kInt8 ? 2 : 1);
    at = (const char*)t.w + (n0 + rows) * t.w_stride * (half_bytes / rows) / 2 + k0 * half_bytes / 2;
  }
  void look(int64_t k) const {  // before k .. k + FETCHED
    fetch(at + k * half_bytes / 2, at + (k + FETCHED) * half_bytes / 2);
  }
};

// c[r][lane] (= or +=) sum over k of w[r][k] x[k][lane] for R rows of w and V vectors of x; rows of bf16 are widened in
// registers.
template <int R, int V, typename T>
inline __attribute__((always_inline)) void small_micro(const T* w, int64_t w_stride, const Ahead& ahead, const float* x,
                                                       int64_t kc, float* c, bool first) {
  vfloat acc[R][V] = {};
  auto add = [&](int64_t k, auto&& widen) __attribute__((always_inline)) {
    vfloat right[V];
    for (int v = 0; v < V; v++) right[v] = load(x + (k * V + v) * W);
#pragma GCC unroll 32
    for (int r = 0; r < R; r++) {
      vfloat left = widen(w + r * w_stride + k);
      for (int v = 0; v < V; v++) acc[r][v] += left * right[v];
    }
  };
  constexpr int64_t LAST = sizeof(T) == 2;  // see splat_low
  for (int64_t k = 0; k < kc - LAST;) {
    ahead.look(k);
    for (int64_t end = min_of(k + FETCHED, kc - LAST); k < end; k++) add(k, [](const T* at) { return splat_low(at); });
  }
  if (LAST) add(kc - 1, [](const T* at) { return splat(to_float(*at)); });
#pragma GCC unroll 32
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) {
      float* to = c + (r * V + v) * W;
      store(to, first ? acc[r][v] : load(to) + acc[r][v]);
    }
}

struct SmallRows {  // some rows of w over a block of k, as fp32
  const float* data;
  int64_t stride;
};

// Rows n0 .. n0 + count - 1 of w (those past n are zeros), k0 .. k0 + kc; buffer: count x KC.
inline SmallRows small_rows(const GemmTerm& t, int64_t n, int64_t n0, int64_t count, int64_t k0, int64_t kc,
                            float* buffer) {
  if (t.w_type == kFp32 && n0 + count <= n) return {(const float*)t.w + n0 * t.w_stride + k0, t.w_stride};
  for (int64_t r = 0; r < count; r++) {
    float* to = buffer + r * KC;
    if (n0 + r >= n) {
      memset(to, 0, size_t(kc) * 4);
      continue;
    }
    const float* row = read_row(t, n0 + r, k0, kc, to);
    if (row != to) memcpy(to, row, size_t(kc) * 4);
  }
  return {buffer, KC};
}

template <int R, int V>
inline void small_block(const SmallRows& w, const Ahead& ahead, const float* x, int64_t kc, float* c, bool first) {
  if (w.stride == KC)
    small_micro<R, V>(w.data, KC, ahead, x, kc, c, first);
  else
    small_micro<R, V>(w.data, w.stride, ahead, x, kc, c, first);
}

// c[r][LINES] (= or +=) sum over k of x[k][r] w[line][k] for R rows of x, W to a k.
template <int R, typename T>
inline void fewest_micro(const T* const* rows, const Ahead& ahead, const float* x, int64_t kc, float* c, bool first) {
  constexpr int STEP_K = 16 / sizeof(T);
  vfloat acc[LINES / W][R] = {};
  int64_t k = 0;
  for (; k + STEP_K <= kc; k += STEP_K) {
    if (k % FETCHED == 0) ahead.look(k);
#pragma GCC unroll 4
    for (int g = 0; g < LINES / W; g++) {
      vfloat columns[STEP_K];
      columns_of(rows + g * W, k, columns);
#pragma GCC unroll 8
      for (int i = 0; i < STEP_K; i++)
        for (int r = 0; r < R; r++) acc[g][r] += columns[i] * splat(x[(k + i) * W + r]);
    }
  }
  for (; k < kc; k++)
    for (int g = 0; g < LINES / W; g++) {
      float column[W];
      for (int i = 0; i < W; i++) column[i] = to_float(rows[g * W + i][k]);
      for (int r = 0; r < R; r++) acc[g][r] += load(column) * splat(x[k * W + r]);
    }
  for (int r = 0; r < R; r++)
    for (int g = 0; g < LINES / W; g++) {
      float* to = c + r * LINES + g * W;
      store(to, first ? acc[g][r] : load(to) + acc[g][r]);
    }
}

// Eight codes of each of W lines, one line a lane; bytes: of each line, up to 4.
template <int BYTES>
inline vuint codes_of(const uint8_t* const* lines, int64_t at) {
  uint32_t words[W] = {};
  for (int i = 0; i < W; i++) memcpy(words + i, lines[i] + at, BYTES);
  vuint word;
  memcpy(&word, words, sizeof word);
  return word;
}

// acc[r] += scale * value x[r] over the first COUNT of eight codes, the first in a byte's high nibble.
template <int R, int COUNT>
inline void add_codes(vuint word, const Values& values, vfloat scale, const float* x, vfloat* acc) {
#pragma GCC unroll 8
  for (int j = 0; j < COUNT; j++) {
    vfloat w = values.of(word >> (j % 2 ? 4 * j - 4 : 4 * j + 4)) * scale;
    for (int r = 0; r < R; r++) acc[r] += w * (x[j * W + r] - vfloat{});
  }
}

// The same for 4-bit rows: every line has its codes in a lane of its own, so that nothing is transposed. The lengths of
// lines and of the blocks that share a scale are multiples of 64, those of blocks of k multiples of 4.
template <int R>
inline void fewest_codes(const GemmTerm& t, const int64_t* numbers, int64_t k0, int64_t kc, const float* x, float* c,
                         bool first) {
  constexpr int GROUPS = LINES / W;
  const Values values(t.values);
  const uint8_t* lines[LINES];
  for (int i = 0; i < LINES; i++) lines[i] = (const uint8_t*)t.w + ((numbers[i] * t.w_stride + k0) >> 1);
  vfloat acc[GROUPS][R] = {};
  for (int64_t k = 0; k < kc;) {
    int64_t end = k + min_of(kc - k, 64 - (k0 + k) % 64);
    vfloat scales[GROUPS];
    for (int g = 0; g < GROUPS; g++) {
      float lanes[W];
      for (int i = 0; i < W; i++)
        lanes[i] = block_scale(t, (numbers[g * W + i] * t.w_stride + k0 + k) >> t.block_shift);
      scales[g] = load(lanes);
    }
    for (; k + 8 <= end; k += 8)
#pragma GCC unroll 4
      for (int g = 0; g < GROUPS; g++)
        add_codes<R, 8>(codes_of<4>(lines + g * W, k >> 1), values, scales[g], x + k * W, acc[g]);
    for (; k < end; k += 4)
      for (int g = 0; g < GROUPS; g++)
        add_codes<R, 4>(codes_of<2>(lines + g * W, k >> 1), values, scales[g], x + k * W, acc[g]);
  }
  for (int r = 0; r < R; r++)
    for (int g = 0; g < GROUPS; g++) {
      float* to = c + r * LINES + g * W;
      store(to, first ? acc[g][r] : load(to) + acc[g][r]);
    }
}

// Sixteen bytes of each of W lines from `at` on, as four words a line: words[j] has bytes 4j .. 4j + 3, one line a lane.
inline void words_of(const int8_t* const* lines, int64_t at, vuint* words) {
  vfloat parts[4];
  for (int i = 0; i < 4; i++) {
    quad own[W / 4];
    for (int p = 0; p < W / 4; p++) memcpy(&own[p], lines[4 * p + i] + at, 16);
    parts[i] = join(own);
  }
  transpose4(parts[0], parts[1], parts[2], parts[3]);
  for (int j = 0; j < 4; j++) words[j] = (vuint)parts[j];
}

// acc[r] += code * scale / 127 * x[r] over the first `count` bytes of a word, the lowest first.
template <int R>
inline void add_bytes(vuint word, vfloat scale, int count, const float* x, vfloat* acc) {
#pragma GCC unroll 4
  for (int i = 0; i < count; i++) {
    vint code = (vint)(word << (24 - 8 * i)) >> 24;
    vfloat w = __builtin_convertvector(code, vfloat) * scale * kInt8Step;
    for (int r = 0; r < R; r++) acc[r] += w * (x[i * W + r] - vfloat{});
  }
}

// The same for 8-bit rows, each in a lane of its own.
template <int R>
inline void fewest_bytes(const GemmTerm& t, const int64_t* numbers, int64_t k0, int64_t kc, const float* x, float* c,
                         bool first) {
  constexpr int GROUPS = LINES / W;
  const int8_t* lines[LINES];
  float absmax[LINES];
  for (int i = 0; i < LINES; i++) {
    lines[i] = (const int8_t*)t.w + numbers[i] * t.w_stride + k0;
    absmax[i] = t.absmax[numbers[i]];
  }
  vfloat acc[GROUPS][R] = {};
  int64_t k = 0;
  for (; k + 16 <= kc; k += 16)
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++) {
      vuint words[4];
      words_of(lines + g * W, k, words);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) add_bytes<R>(words[j], load(absmax + g * W), 4, x + (k + 4 * j) * W, acc[g]);
    }
  for (; k < kc; k += 4) {
    int count = int(min_of(4, kc - k));
    for (int g = 0; g < GROUPS; g++) {
      uint32_t words[W] = {};
      for (int i = 0; i < W; i++) memcpy(words + i, lines[g * W + i] + k, size_t(count));
      vuint word;
      memcpy(&word, words, sizeof word);
      add_bytes<R>(word, load(absmax + g * W), count, x + k * W, acc[g]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int g = 0; g < GROUPS; g++) {
      float* to = c + r * LINES + g * W;
      store(to, first ? acc[g][r] : load(to) + acc[g][r]);
    }
}

// The same for LINES rows of any w from n0 on; buffer: LINES x KC. Rows past n repeat the last one.
template <int R>
inline void fewest_block(const GemmTerm& t, int64_t n, int64_t n0, int64_t k0, int64_t kc, const float* x,
                         float* buffer, float* c, bool first) {
  const Ahead ahead(t, n0, LINES, k0);
  if (t.w_type == kBf16) {
    const bf16* rows[LINES];
    for (int i = 0; i < LINES; i++) rows[i] = (const bf16*)t.w + min_of(n0 + i, n - 1) * t.w_stride + k0;
    return fewest_micro<R>(rows, ahead, x, kc, c, first);
  }
  if (t.w_type == kInt8 || (t.w_type == kFourBits && t.w_stride % 64 == 0 && t.block_shift >= 6)) {
    int64_t lines[LINES];
    for (int i = 0; i < LINES; i++) lines[i] = min_of(n0 + i, n - 1);
    if (t.w_type == kInt8) return fewest_bytes<R>(t, lines, k0, kc, x, c, first);
    return fewest_codes<R>(t, lines, k0, kc, x, c, first);
  }
  const float* rows[LINES];
  for (int i = 0; i < LINES; i++) rows[i] = read_row(t, min_of(n0 + i, n - 1), k0, kc, buffer + i * KC);
  fewest_micro<R>(rows, ahead, x, kc, c, first);
}

}  // namespace
}  // namespace tunegate::TUNEGATE_LEVEL
