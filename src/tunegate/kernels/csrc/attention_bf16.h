// Part of attention.cpp: bf16 on the matrix units, where the level has them (bf16_units.h).
//
// Scores stay transposed, keys by queries, in panels of 32 lanes, so each of the five products of forward and backward
// is rows of bf16 against a panel in pair layout. Queries, keys and values are multiplied as they are stored and the
// scale comes after; P and dS are rounded to bf16 between their products, as in FlashAttention-2 (Dao 2023). Sums and
// softmax are fp32. Dims, keys and lanes are padded with zeros to multiples of 32.
#pragma once
#include "attention_backward.h"
#include "bf16_units.h"

#ifdef TUNEGATE_HAS_BF16
namespace tunegate::TUNEGATE_LEVEL {
namespace {

constexpr int64_t kMostDims = 256;
static_assert(STEP == 32 && COLUMNS == 32, "what is padded to 32 here");

inline int64_t whole(int64_t n) { return round_up(n, 32); }
inline bf16* halves(float* p) { return reinterpret_cast<bf16*>(p); }

// The units are this thread's while it lives.
struct Units {
  Units() { open_tiles(); }
  ~Units() { close_tiles(); }
};

// c (rows, 32) = or += x (rows, k) times a panel; all of rows and k multiples of 32.
inline void matrix_product(const bf16* x, int64_t x_stride, int64_t rows, const bf16* panel, int64_t k, float* c,
                           bool first) {
  for (int64_t r = 0; r < rows; r += 32) micro_bf16(x + r * x_stride, x_stride, 32, panel, k / STEP, c + r * 32, first);
}

// Where 32 lanes' rows begin, each readable to whole(dim) with zeros past dim; zeros for lanes past the last.
struct LaneRows {
  const bf16* row[32];
  alignas(64) bf16 copies[32][kMostDims];
  LaneRows(View<const bf16> x, const Lanes& lanes, int64_t begin, int64_t dim) {
    alignas(64) static const bf16 zeros[kMostDims] = {};
    for (int64_t i = 0; i < 32; i++) {
      int64_t lane = begin + i;
      row[i] = zeros;
      if (lane >= lanes.count) continue;
      row[i] = x.at(lanes.token(lane), lanes.head(lane));
      if (dim % 32 == 0) continue;
      memcpy(copies[i], row[i], size_t(dim) * 2);
      memset((void*)(copies[i] + dim), 0, size_t(whole(dim) - dim) * 2);
      row[i] = copies[i];
    }
  }
  // A panel with the lanes as columns, k along the dims.
  void as_columns(int64_t dim, bf16* to) const {
    const bf16* from[16];
    for (int64_t d = 0; d < dim; d += STEP)
      for (int64_t j = 0; j < 32; j += 16, to += TILE) {
        for (int64_t i = 0; i < 16; i++) from[i] = row[j + i] + d;
        transpose_pairs(from, to);
      }
  }
  // Their step of the panels with the dims as columns, k along the lanes; panels lie panel elements apart.
  void as_rows(int64_t dim, int64_t panel, bf16* to) const {
    for (int64_t d = 0; d < dim; d += 16) {
      bf16* tile = to + d / 32 * panel + d % 32 / 16 * TILE;
      for (int64_t i = 0; i < 16; i++) interleave(row[2 * i] + d, row[2 * i + 1] + d, tile + i * 32);
    }
  }
};

// Two rows of 32 fp32 as one row of pairs in each of a step's two tiles.
inline void round_pairs(const float* a, const float* b, bf16* to) {
  for (int64_t j = 0; j < 2; j++) {
    vuint pairs = bf16_bits(load(a + j * W)) | bf16_bits(load(b + j * W)) << 16;
    memcpy((void*)(to + j * TILE), &pairs, sizeof pairs);
  }
}

// (rows, 32) of fp32 as a panel, k along the rows; rows a multiple of 32.
inline void round_panel(const float* x, int64_t rows, bf16* to) {
  for (int64_t n = 0; n < rows; n += 2) round_pairs(x + n * 32, x + n * 32 + 32, to + n / 32 * 2 * TILE + n % 32 * 16);
}

// A range of keys as rows of whole(dim), then zero rows up to a multiple of 32.
inline void gather_halves(View<const bf16> x, const KeyRange& r, int64_t dim, bf16* to) {
  int64_t stride = whole(dim);
  for (int64_t n = 0; n < whole(r.count); n++, to += stride) {
    int64_t kept = n < r.count ? dim : 0, place = r.first + n;
    if (kept) memcpy(to, x.at(place < r.prefix ? place : r.start + place - r.prefix, r.kv), size_t(dim) * 2);
    memset((void*)(to + kept), 0, size_t(stride - kept) * 2);
  }
}

// to (columns, stride) = from (rows, columns) transposed; both multiples of 32.
inline void transpose(const bf16* from, int64_t rows, int64_t columns, bf16* to, int64_t stride) {
  alignas(64) bf16 pairs[16][32], square[16][32];
  const bf16* each[16];
  for (int64_t i = 0; i < 16; i++) each[i] = pairs[i];
  for (int64_t n = 0; n < rows; n += 32)
    for (int64_t d = 0; d < columns; d += 16) {
      const bf16* at = from + n * columns + d;
      for (int64_t i = 0; i < 16; i++) interleave(at + 2 * i * columns, at + (2 * i + 1) * columns, pairs[i]);
      transpose_pairs(each, square[0]);
      for (int64_t i = 0; i < 16; i++) memcpy(to + (d + i) * stride + n, square[i], 64);
    }
}

inline void times(float* x, int64_t count, float factor) {
  for (int64_t i = 0; i < count; i += W) store(x + i, load(x + i) * factor);
}

struct MatrixForward {  // members: see VectorForward
  static constexpr int64_t kLanes = 32, kWidth = 32, kStep = 32;
  Units units;
  float *out, *maximum, *total, *scores;  // out: (whole(value_dim), 32) of each panel
  int32_t* position;
  bf16 *q, *k, *v, *columns, *p;  // q: panels; k: (keys, whole(dim)); columns: v's, (whole(value_dim), keys); p: a panel
  int64_t keys;
  MatrixForward(const AttentionShape& s, int64_t lanes, int64_t most) : keys(most) {
    int64_t dim = whole(s.dim), value_dim = whole(s.value_dim);
    Arena arena(lanes * (dim / 2 + value_dim + 3) + keys * (dim / 2 + value_dim + 32 + 16));
    out = arena.take(lanes * value_dim);
    maximum = arena.take(lanes);
    total = arena.take(lanes);
    position = reinterpret_cast<int32_t*>(arena.take(lanes));
    scores = arena.take(keys * 32);
    q = halves(arena.take(lanes * dim / 2));
    k = halves(arena.take(keys * dim / 2));
    v = halves(arena.take(keys * value_dim / 2));
    columns = halves(arena.take(keys * value_dim / 2));
    p = halves(arena.take(keys * 16));
  }
  void begin(const AttentionShape& s, const TokenView& queries, const Lanes& lanes) {
    for (int64_t m = 0; m < lanes.padded; m += 32)
      LaneRows(View<const bf16>(queries), lanes, m, s.dim).as_columns(whole(s.dim), q + m * whole(s.dim));
    for (int64_t m = 0; m < lanes.padded; m++) maximum[m] = kLowest, total[m] = 0.0f;
    memset(out, 0, size_t(lanes.padded * whole(s.value_dim)) * 4);
  }
  void take_keys(const AttentionShape& s, const TokenView& from_k, const TokenView& from_v, const KeyRange& range) {
    gather_halves(View<const bf16>(from_k), range, s.dim, k);
    gather_halves(View<const bf16>(from_v), range, s.value_dim, v);
    transpose(v, whole(range.count), whole(s.value_dim), columns, keys);
  }
  void panel(const AttentionShape& s, int64_t m, int64_t, int64_t skip, int64_t rows, int64_t first,
             const Softmax& state) {
    int64_t dim = whole(s.dim), value_dim = whole(s.value_dim);
    alignas(64) float factor[32];
    float* sums = out + m * value_dim;
    matrix_product(k + skip * dim, dim, rows, q + m * dim, dim, scores, true);
    times(scores, rows * 32, s.softcap > 0 ? s.scale / s.softcap : s.scale);
    if (s.softcap > 0) cap_scores<2>(scores, rows, s.softcap);
    mask_scores<2>(scores, first, rows, state);
    exponentials<2>(scores, rows, state, factor);
    round_panel(scores, rows, p);
    for (int64_t d = 0; d < value_dim; d++)
      for (int64_t j = 0; j < 32; j += W) store(sums + d * 32 + j, load(sums + d * 32 + j) * load(factor + j));
    matrix_product(columns + skip, keys, value_dim, p, rows, sums, false);
  }
  const float* panel_out(const AttentionShape& s, int64_t m) const { return out + m * whole(s.value_dim); }
};

struct MatrixBackward {  // members: see VectorBackward
  static constexpr int64_t kLanes = 32, kWidth = 32, kStep = 32;
  Units units;
  float *lse, *delta, *ones, *scores, *slopes, *grad_k, *grad_v, *grad_q;  // gradients: (rows, 32) of each panel of dims
  int32_t* position;
  bf16 *q, *grad_out, *q_rows, *grad_out_rows;  // panels: lanes as columns; dims as columns
  bf16 *k, *v, *columns;                        // (keys, whole dims), and k's columns (whole(dim), keys)
  bf16 *p, *ds, *slope_panel;                   // (keys, lanes), and dS of one panel as a right factor
  int64_t lanes, keys;
  MatrixBackward(const AttentionShape& s, int64_t most_lanes, int64_t most_keys) : lanes(most_lanes), keys(most_keys) {
    int64_t dim = whole(s.dim), value_dim = whole(s.value_dim), both = dim + value_dim;
    Arena arena(lanes * (both + 4) + keys * (64 + both + both / 2 + dim / 2 + lanes + 16) + dim * 32);
    lse = arena.take(lanes);
    delta = arena.take(lanes);
    ones = arena.take(lanes);
    position = reinterpret_cast<int32_t*>(arena.take(lanes));
    scores = arena.take(keys * 32);
    slopes = arena.take(keys * 32);
    grad_k = arena.take(keys * dim);
    grad_v = arena.take(keys * value_dim);
    grad_q = arena.take(dim * 32);
    q = halves(arena.take(lanes * dim / 2));
    q_rows = halves(arena.take(lanes * dim / 2));
    grad_out = halves(arena.take(lanes * value_dim / 2));
    grad_out_rows = halves(arena.take(lanes * value_dim / 2));
    k = halves(arena.take(keys * dim / 2));
    columns = halves(arena.take(keys * dim / 2));
    v = halves(arena.take(keys * value_dim / 2));
    p = halves(arena.take(keys * lanes / 2));
    ds = halves(arena.take(keys * lanes / 2));
    slope_panel = halves(arena.take(keys * 16));
  }
  void take_keys(const AttentionBackward& call, const KeyRange& range) {
    const AttentionShape& s = call.shape;
    gather_halves(View<const bf16>(call.k), range, s.dim, k);
    gather_halves(View<const bf16>(call.v), range, s.value_dim, v);
    transpose(k, whole(range.count), whole(s.dim), columns, keys);
    memset(grad_k, 0, size_t(keys * whole(s.dim)) * 4);
    memset(grad_v, 0, size_t(keys * whole(s.value_dim)) * 4);
  }
  void take_queries(const AttentionBackward& call, const Lanes& group) {
    int64_t dim = call.shape.dim, value_dim = call.shape.value_dim;
    for (int64_t m = 0; m < group.padded; m += 32) {
      LaneRows queries(View<const bf16>(call.q), group, m, dim);
      queries.as_columns(whole(dim), q + m * whole(dim));
      queries.as_rows(whole(dim), lanes * 32, q_rows + m * 32);
      LaneRows grads(View<const bf16>(call.grad_out), group, m, value_dim);
      grads.as_columns(whole(value_dim), grad_out + m * whole(value_dim));
      grads.as_rows(whole(value_dim), lanes * 32, grad_out_rows + m * 32);
    }
  }
  void panel(const AttentionShape& s, const Lanes&, int64_t m, int64_t, PanelRange range, const Softmax& state,
             int64_t first) {
    int64_t dim = whole(s.dim), value_dim = whole(s.value_dim), rows = range.end - range.begin;
    matrix_product(k + range.begin * dim, dim, rows, q + m * dim, dim, scores, true);
    matrix_product(v + range.begin * value_dim, value_dim, rows, grad_out + m * value_dim, value_dim, slopes, true);
    times(scores, rows * 32, s.softcap > 0 ? s.scale / s.softcap : s.scale);
    probabilities<2>(s, first + range.begin, rows, 32, state, lse + m, delta + m, scores, slopes);
    for (int64_t n = 0; n < rows; n++)
      for (int64_t j = 0; j < 32; j += W) {
        int64_t at = (range.begin + n) * lanes + m + j;
        store(p + at, load(scores + n * 32 + j));
        store(ds + at, load(slopes + n * 32 + j));
      }
    round_panel(slopes, rows, slope_panel);
    matrix_product(columns + range.begin, keys, dim, slope_panel, rows, grad_q, true);
  }
  void add_gradients(const AttentionShape& s, const Lanes& group, const Keys& taken, PanelRange range) {
    for (int64_t n = range.begin; n < range.end; n += 32) {
      // the lanes that see some of these keys: see add_key_gradient
      int64_t from = 0, to = group.padded;
      if (taken.causal) {
        int64_t ahead = taken.first + n - group.first;
        from = max_of(0, min_of(group.count, ahead * group.group)) / 32 * 32;
        to = max_of(from, min_of(group.padded, whole((ahead + 31 + s.window) * group.group)));
      }
      for (int64_t d = 0; d < whole(s.value_dim); d += 32)
        matrix_product(p + n * lanes + from, lanes, 32, grad_out_rows + d * lanes + from * 32, to - from,
                       grad_v + d * keys + n * 32, false);
      for (int64_t d = 0; d < whole(s.dim); d += 32)
        matrix_product(ds + n * lanes + from, lanes, 32, q_rows + d * lanes + from * 32, to - from,
                       grad_k + d * keys + n * 32, false);
    }
  }
  template <typename O>
  void put_gradients(const AttentionShape& s, int64_t count, O* to_k, int64_t k_step, O* to_v, int64_t v_step) const {
    for (int64_t d = 0; d < s.dim; d += 32)
      put_rows(grad_k + d * keys, 32, count, min_of(32, s.dim - d), to_k + d, k_step, s.scale);
    for (int64_t d = 0; d < s.value_dim; d += 32)
      put_rows(grad_v + d * keys, 32, count, min_of(32, s.value_dim - d), to_v + d, v_step);
  }
};

}  // namespace
}  // namespace tunegate::TUNEGATE_LEVEL
#endif
