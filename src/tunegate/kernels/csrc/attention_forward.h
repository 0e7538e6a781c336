// Part of attention.cpp: one block of queries over its keys, with the online softmax of Milakov & Gimelshein (2018),
// key block by key block.
#pragma once
#include "attention_tiles.h"

namespace tunegate::TUNEGATE_LEVEL {
namespace {

constexpr float kLowest = -1e30f;  // the maximum before any score; finite, so that a hidden score's -inf gives 0

struct Softmax {  // of one panel: what masks, and the running state
  int64_t window;
  const int32_t* position;  // of each lane
  int64_t lowest, highest;  // position among the panel's lanes
  int64_t end;              // no key stands here or later
  float *maximum, *total;
};

// c * tanh(s / c); the scores come divided by c.
template <int N>
inline void cap_scores(float* scores, int64_t rows, float cap) {
  for (int64_t i = 0; i < rows * N; i++) store(scores + i * W, vtanh(load(scores + i * W)) * cap);
}

inline bool all_see(int64_t key, const Softmax& s) {
  return key <= s.lowest && key > s.highest - s.window && key < s.end;
}

// -inf for the lanes of vector j that may not see the key: it is after them, or window or more before them.
inline vfloat hide(vfloat score, int64_t key, int j, const Softmax& s) {
  vint position;
  memcpy(&position, s.position + j * W, sizeof position);
  vint ahead = position - int32_t(key);
  vint hidden = (vint)(ahead < 0) | (vint)(ahead >= int32_t(s.window));
  return key < s.end ? select(hidden, splat(-INFINITY), score) : splat(-INFINITY);
}

template <int N>
inline void mask_scores(float* scores, int64_t first, int64_t rows, const Softmax& s) {
  for (int64_t n = 0; n < rows; n++) {
    int64_t key = first + n;
    if (all_see(key, s)) continue;
    for (int j = 0; j < N; j++) {
      float* p = scores + (n * N + j) * W;
      store(p, hide(load(p), key, j, s));
    }
  }
}

// Scores become exp(score - maximum); factor receives what older sums are to be multiplied by.
template <int N>
inline void exponentials(float* scores, int64_t rows, const Softmax& s, float* factor) {
  for (int j = 0; j < N; j++) {
    vfloat before = load(s.maximum + j * W), top = before;
    for (int64_t n = 0; n < rows; n++) top = vmax(load(scores + (n * N + j) * W), top);
    vfloat total = vfloat{};
    for (int64_t n = 0; n < rows; n++) {
      float* p = scores + (n * N + j) * W;
      vfloat weight = exp_down(load(p) - top);
      store(p, weight);
      total += weight;
    }
    vfloat shrink = exp_down(before - top);
    store(s.total + j * W, load(s.total + j * W) * shrink + total);
    store(s.maximum + j * W, top);
    store(factor + j * W, shrink);
  }
}

struct PanelWork {
  const float *q, *k, *v;  // q: (dim, lanes); k, v: (rows, dim), beginning at key first
  float *scores, *out;     // out: (value_dim, lanes)
  int64_t first, rows;     // rows: a multiple of kRows
};

template <int N>
inline void forward_panel(const AttentionShape& shape, const PanelWork& work, const Softmax& state) {
  constexpr int64_t lanes = N * W;
  alignas(64) float factor[lanes];
  product<N, kFresh>(work.rows, {work.k, shape.dim, 1}, work.q, lanes, shape.dim, work.scores, lanes);
  if (shape.softcap > 0) cap_scores<N>(work.scores, work.rows, shape.softcap);
  mask_scores<N>(work.scores, work.first, work.rows, state);
  exponentials<N>(work.scores, work.rows, state, factor);
  product<N, kRescale>(shape.value_dim, {work.v, 1, shape.value_dim}, work.scores, lanes, work.rows, work.out, lanes,
                       factor);
}

// What a task of forward holds, and how it computes with it: on vectors, everything widened. MatrixForward
// (attention_bf16.h) has the same members.
template <typename T>
struct VectorForward {
  static constexpr int64_t kLanes = W, kWidth = kPanel, kStep = kRows;  // lanes, a panel's lanes, keys: multiples of
  float *q, *out, *maximum, *total, *k, *v, *scores;
  int32_t* position;
  VectorForward(const AttentionShape& s, int64_t lanes, int64_t keys) {
    Arena arena(lanes * (s.dim + s.value_dim + 3) + keys * (s.dim + s.value_dim + kPanel));
    q = arena.take(lanes * s.dim);
    out = arena.take(lanes * s.value_dim);
    maximum = arena.take(lanes);
    total = arena.take(lanes);
    position = reinterpret_cast<int32_t*>(arena.take(lanes));
    k = arena.take(keys * s.dim);
    v = arena.take(keys * s.value_dim);
    scores = arena.take(keys * kPanel);
  }
  void begin(const AttentionShape& s, const TokenView& queries, const Lanes& lanes) {
    float factor = s.softcap > 0 ? s.scale / s.softcap : s.scale;
    for (int64_t m = 0; m < lanes.padded; m += kPanel)
      pack_columns(View<const T>(queries), lanes, m, min_of(kPanel, lanes.padded - m), s.dim, factor, q + m * s.dim);
    for (int64_t m = 0; m < lanes.padded; m++) maximum[m] = kLowest, total[m] = 0.0f;
    memset(out, 0, size_t(lanes.padded * s.value_dim) * 4);
  }
  void take_keys(const AttentionShape& s, const TokenView& keys, const TokenView& values, const KeyRange& range) {
    gather(View<const T>(keys), range, s.dim, k);
    gather(View<const T>(values), range, s.value_dim, v);
  }
  // rows keys (a multiple of kStep) from number skip of those taken on; the first one stands at position first
  void panel(const AttentionShape& s, int64_t m, int64_t width, int64_t skip, int64_t rows, int64_t first,
             const Softmax& state) {
    PanelWork work = {q + m * s.dim, k + skip * s.dim, v + skip * s.value_dim, scores, out + m * s.value_dim, first, rows};
    if (width == 3 * W) forward_panel<3>(s, work, state);
    if (width == 2 * W) forward_panel<2>(s, work, state);
    if (width == W) forward_panel<1>(s, work, state);
  }
  const float* panel_out(const AttentionShape& s, int64_t m) const { return out + m * s.value_dim; }
};

// All panels of the lanes over the key block at position first; a panel leaves out what none of its lanes sees.
template <typename F>
inline void key_block_step(const AttentionShape& s, const Lanes& lanes, int64_t first, int64_t count, F& b) {
  for (int64_t m = 0; m < lanes.padded; m += F::kWidth) {
    int64_t width = min_of(F::kWidth, lanes.padded - m), last = min_of(m + width, lanes.count) - 1;
    Softmax state = {s.window,       b.position + m, b.position[m], b.position[last],
                     first + count, b.maximum + m,  b.total + m};
    int64_t skip = max_of(0, state.lowest - s.window + 1 - first) / F::kStep * F::kStep;
    int64_t end = min_of(count, state.highest + 1 - first);
    if (end <= skip) continue;
    b.panel(s, m, width, skip, round_up(end - skip, F::kStep), first + skip, state);
  }
}

template <typename T, typename F>
void forward_block(const AttentionForward& call, const QueryBlock& block, int64_t kv) {
  const AttentionShape& s = call.shape;
  int64_t group = s.heads / s.kv_heads, size = key_block(s);
  Lanes lanes = {block.start + block.first - s.skipped, block.count * group, round_up(block.count * group, F::kLanes),
                 kv, group};
  F b(s, lanes.padded, size);
  b.begin(s, call.q, lanes);
  int64_t base = block.prefix + block.first, keys = base + block.count;
  for (int64_t m = 0; m < lanes.padded; m++) b.position[m] = int32_t(base + min_of(m, lanes.count - 1) / group);
  for (int64_t first = max_of(0, base - s.window + 1); first < keys; first += size) {
    int64_t count = min_of(size, keys - first);
    b.take_keys(s, call.k, call.v, {kv, block.prefix, block.start, first, count});
    key_block_step(s, lanes, first, count, b);
  }
  for (int64_t m = 0; m < lanes.count; m++)
    call.lse[lanes.token(m) * s.heads + lanes.head(m)] = b.maximum[m] + logf(b.total[m]);
  for (int64_t m = 0; m < lanes.padded; m += W) store(b.total + m, 1.0f / load(b.total + m));
  for (int64_t m = 0; m < lanes.padded; m += F::kWidth)
    unpack_columns<false>(b.panel_out(s, m), min_of(F::kWidth, lanes.padded - m), s.value_dim, b.total + m,
                          View<T>(call.out), lanes, m);
}

}  // namespace
}  // namespace tunegate::TUNEGATE_LEVEL
