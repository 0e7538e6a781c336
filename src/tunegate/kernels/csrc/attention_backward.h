// Part of attention.cpp: gradients, from probabilities recomputed with the forward's log-sum-exp (Dao et al. 2022).
//
// With S the scores, P = exp(S - lse), dP = dO V^T and delta = rowsum(dO * O):
// dV = P^T dO, dS = P * (dP - delta), dQ = scale dS K, dK = scale dS^T Q.
//
// A task owns some keys and one kv head and adds up their gradients itself. Its parts of dQ it adds to the rows'
// sums in the order of the keys: within a task by itself, between the chunks of a long row by waiting until the chunk
// before has finished the same queries. Tasks are taken in order, so what a task waits for is already running.
#pragma once
#include <sched.h>

#include "attention_forward.h"

namespace tunegate::TUNEGATE_LEVEL {
namespace {

constexpr int64_t kGroupLanes = 96;  // a multiple of kPanel at every width; dK and dV sum this many queries at a time

struct Keys {  // what a task holds at a time
  int64_t first, count;  // position of the first one
  bool causal;           // lanes are in the order of their positions, one row's; else anything may see anything
};

// Scores and dP of one panel to P and dS, in place.
template <int N>
inline void probabilities(const AttentionShape& s, int64_t first, int64_t rows, int64_t stride, const Softmax& state,
                          const float* lse, const float* delta, float* p, float* ds) {
  for (int64_t n = 0; n < rows; n++) {
    int64_t key = first + n;
    bool all_seen = all_see(key, state);
    for (int j = 0; j < N; j++) {
      float *at = p + n * stride + j * W, *gradient = ds + n * stride + j * W;
      vfloat score = load(at), inner = splat(1.0f);
      if (s.softcap > 0) {
        vfloat t = vtanh(score);
        score = t * s.softcap;
        inner = 1.0f - t * t;
      }
      if (!all_seen) score = hide(score, key, j, state);
      // exp_down takes arguments up to about 88; rounding may lift score - lse a little above 0
      vfloat weight = exp_down(score - load(lse + j * W));
      store(at, weight);
      store(gradient, weight * (load(gradient) - load(delta + j * W)) * inner);
    }
  }
}

struct PanelRange {
  int64_t begin, end;  // among the keys taken, those that some lane of the panel sees, in multiples of kStep
};

// grad(keys, columns) += weights(keys, lanes) x(lanes, columns), for each tile of keys over the lanes that see it.
template <int N>
inline void add_key_gradient(const AttentionShape& s, const Lanes& lanes, const Keys& keys, PanelRange range,
                             const float* weights, const float* x, float* grad, int64_t stride) {
  int64_t top = lanes.count;
  for (int64_t n = range.begin; n < range.end; n += kRows) {
    int64_t from = 0, to = top;
    if (keys.causal) {
      // lane m stands at position first query's + m / group
      int64_t ahead = keys.first + n;
      from = max_of(0, min_of(top, (ahead - lanes.first) * lanes.group));
      to = max_of(from, min_of(top, (ahead + kRows - 1 + s.window - lanes.first) * lanes.group));
    }
    Operand part = {weights + n * lanes.padded + from, lanes.padded, 1};
    tile<kRows, N, kAdd>(part, x + from * stride, stride, to - from, grad + n * stride, stride, nullptr);
  }
}

inline void add_key_gradients(const AttentionShape& s, const Lanes& lanes, const Keys& keys, PanelRange range,
                              const float* weights, const float* x, float* grad, int64_t columns) {
  for (int64_t d = 0; d < columns; d += kPanel) {
    int64_t vectors = min_of(kPanel, columns - d) / W;
    if (vectors == 3) add_key_gradient<3>(s, lanes, keys, range, weights, x + d, grad + d, columns);
    if (vectors == 2) add_key_gradient<2>(s, lanes, keys, range, weights, x + d, grad + d, columns);
    if (vectors == 1) add_key_gradient<1>(s, lanes, keys, range, weights, x + d, grad + d, columns);
  }
}

// The taken keys that some lane from begin to end sees, in multiples of each.
inline PanelRange rows_seen(const AttentionShape& s, const Lanes& lanes, const Keys& keys, int64_t begin, int64_t end,
                            const int32_t* position, int64_t each) {
  int64_t lowest = position[begin], highest = lowest;
  for (int64_t i = begin; i < min_of(end, lanes.count); i++) {
    lowest = min_of(lowest, position[i]);
    highest = max_of(highest, position[i]);
  }
  int64_t from = max_of(0, lowest - s.window + 1 - keys.first) / each * each;
  int64_t to = round_up(max_of(0, min_of(keys.count, highest + 1 - keys.first)), each);
  return {min_of(from, to), to};
}

// Rows of sums, times a factor, to their place.
template <typename T>
inline void put_rows(const float* from, int64_t stride, int64_t count, int64_t dim, T* to, int64_t step,
                     float factor = 1.0f) {
  for (int64_t n = 0; n < count; n++)
    for (int64_t d = 0; d < dim; d += 4) store4(to + n * step + d, load4(from + n * stride + d) * factor);
}

// What a task of backward holds, and how it computes with it: on vectors, everything widened. MatrixBackward
// (attention_bf16.h) has the same members.
template <typename T>
struct VectorBackward {
  static constexpr int64_t kLanes = W, kWidth = kPanel, kStep = kRows;  // lanes, a panel's lanes, keys: multiples of
  float *q, *grad_out;            // columns, panel by panel: (dim, lanes), (value_dim, lanes)
  float *q_rows, *grad_out_rows;  // (lanes, dims padded to vectors), q times scale
  float *lse, *delta, *ones;
  int32_t* position;
  float *k, *v, *grad_k, *grad_v;  // (keys, dim); the gradients' dims padded to vectors
  float *p, *ds;                   // (keys, lanes)
  float* grad_q;                   // (dim, kPanel)
  VectorBackward(const AttentionShape& s, int64_t lanes, int64_t keys) {
    int64_t wide = round_up(s.dim, W), value_wide = round_up(s.value_dim, W);
    Arena arena(lanes * (s.dim + s.value_dim + wide + value_wide + 4 + 2 * keys) +
                keys * (s.dim + s.value_dim + wide + value_wide) + s.dim * kPanel);
    q = arena.take(lanes * s.dim);
    grad_out = arena.take(lanes * s.value_dim);
    q_rows = arena.take(lanes * wide);
    grad_out_rows = arena.take(lanes * value_wide);
    lse = arena.take(lanes);
    delta = arena.take(lanes);
    ones = arena.take(lanes);
    position = reinterpret_cast<int32_t*>(arena.take(lanes));
    k = arena.take(keys * s.dim);
    v = arena.take(keys * s.value_dim);
    grad_k = arena.take(keys * wide);
    grad_v = arena.take(keys * value_wide);
    p = arena.take(keys * lanes);
    ds = arena.take(keys * lanes);
    grad_q = arena.take(s.dim * kPanel);
  }

  // Keys and values of a range, and zeros for their gradients.
  void take_keys(const AttentionBackward& call, const KeyRange& range) {
    const AttentionShape& s = call.shape;
    gather(View<const T>(call.k), range, s.dim, k);
    gather(View<const T>(call.v), range, s.value_dim, v);
    size_t rows = size_t(round_up(range.count, kRows)) * 4;
    memset(grad_k, 0, rows * size_t(round_up(s.dim, W)));
    memset(grad_v, 0, rows * size_t(round_up(s.value_dim, W)));
  }

  void take_queries(const AttentionBackward& call, const Lanes& lanes) {
    const AttentionShape& s = call.shape;
    View<const T> queries(call.q), grads(call.grad_out);
    float factor = s.softcap > 0 ? s.scale / s.softcap : s.scale;
    for (int64_t m = 0; m < lanes.padded; m += kPanel) {
      int64_t width = min_of(kPanel, lanes.padded - m);
      pack_columns(queries, lanes, m, width, s.dim, factor, q + m * s.dim);
      pack_columns(grads, lanes, m, width, s.value_dim, 1.0f, grad_out + m * s.value_dim);
    }
    pack_rows(queries, lanes, s.dim, round_up(s.dim, W), s.scale, q_rows);
    pack_rows(grads, lanes, s.value_dim, round_up(s.value_dim, W), 1.0f, grad_out_rows);
  }

  template <int N>
  void panel_of(const AttentionShape& s, const Lanes& lanes, int64_t m, PanelRange range, const Softmax& state,
                int64_t first) {
    constexpr int64_t width = N * W;
    int64_t stride = lanes.padded, rows = range.end - range.begin;
    float *weights = p + range.begin * stride + m, *gradients = ds + range.begin * stride + m;
    const float *keys = k + range.begin * s.dim, *values = v + range.begin * s.value_dim;
    product<N, kFresh>(rows, {keys, s.dim, 1}, q + m * s.dim, width, s.dim, weights, stride);
    product<N, kFresh>(rows, {values, s.value_dim, 1}, grad_out + m * s.value_dim, width, s.value_dim, gradients, stride);
    probabilities<N>(s, first + range.begin, rows, stride, state, lse + m, delta + m, weights, gradients);
    product<N, kFresh>(s.dim, {keys, 1, s.dim}, gradients, stride, rows, grad_q, width);
  }

  // P and dS of a panel's lanes with the keys of the range, and the panel's grad_q, (dim, width). first: the position
  // of the first key taken.
  void panel(const AttentionShape& s, const Lanes& lanes, int64_t m, int64_t width, PanelRange range,
             const Softmax& state, int64_t first) {
    if (width == 3 * W) panel_of<3>(s, lanes, m, range, state, first);
    if (width == 2 * W) panel_of<2>(s, lanes, m, range, state, first);
    if (width == W) panel_of<1>(s, lanes, m, range, state, first);
  }

  // The lanes' part of the keys' gradients, after all their panels.
  void add_gradients(const AttentionShape& s, const Lanes& lanes, const Keys& keys, PanelRange range) {
    add_key_gradients(s, lanes, keys, range, p, grad_out_rows, grad_v, round_up(s.value_dim, W));
    add_key_gradients(s, lanes, keys, range, ds, q_rows, grad_k, round_up(s.dim, W));
  }

  template <typename O>
  void put_gradients(const AttentionShape& s, int64_t count, O* to_k, int64_t k_step, O* to_v, int64_t v_step) const {
    put_rows(grad_k, round_up(s.dim, W), count, s.dim, to_k, k_step);
    put_rows(grad_v, round_up(s.value_dim, W), count, s.value_dim, to_v, v_step);
  }
};

// One group of queries against the task's keys. grad_q: where its sums are kept, fp32.
// In-row positions for own keys; for the prefix's, positions in the sequence that begins with it.
template <typename B>
inline void group_gradients(const AttentionShape& s, const Lanes& lanes, const Lanes& placed, const Keys& keys,
                            View<float> grad_q, B& b) {
  PanelRange whole = rows_seen(s, lanes, keys, 0, lanes.count, b.position, B::kStep);
  if (whole.begin >= whole.end) return;
  for (int64_t m = 0; m < lanes.padded; m += B::kWidth) {
    int64_t width = min_of(B::kWidth, lanes.padded - m), last = min_of(m + width, lanes.count) - 1;
    PanelRange range = keys.causal ? rows_seen(s, lanes, keys, m, m + width, b.position, B::kStep) : whole;
    if (range.begin >= range.end) continue;
    Softmax state = {s.window, b.position + m, b.position[m], b.position[last], keys.first + keys.count, nullptr, nullptr};
    if (!keys.causal) {
      for (int64_t i = m; i <= last; i++) {
        state.lowest = min_of(state.lowest, b.position[i]);
        state.highest = max_of(state.highest, b.position[i]);
      }
    }
    b.panel(s, lanes, m, width, range, state, keys.first);
    unpack_columns<true>(b.grad_q, width, s.dim, b.ones + m, grad_q, lanes, m);
  }
  b.add_gradients(s, placed, keys, whole);
}

template <typename B>
inline void load_group(const AttentionBackward& call, const Lanes& lanes, B& b) {
  b.take_queries(call, lanes);
  for (int64_t m = 0; m < lanes.padded; m++) {
    int64_t lane = min_of(m, lanes.count - 1), at = lanes.token(lane) * call.shape.heads + lanes.head(lane);
    b.lse[m] = m < lanes.count ? call.lse[at] : 1e30f;  // a padding lane has no weights
    b.delta[m] = call.delta[at];
    b.ones[m] = call.shape.scale;
  }
}

inline int64_t group_tokens(const AttentionShape& s) {
  return max_of(1, kGroupLanes / (s.heads / s.kv_heads));
}

template <typename B>
inline void put_partial(const AttentionBackward& call, int64_t slot, int64_t kv, const Keys& keys, const B& b) {
  const AttentionShape& s = call.shape;
  int64_t each = s.dim + s.value_dim, step = s.kv_heads * each;
  float* to = call.partial + (slot * s.prefix + keys.first) * step + kv * each;
  b.put_gradients(s, keys.count, to, step, to + s.dim, step);
}

inline void wait_for(const int64_t* finished, int64_t wanted) {
  for (int tries = 0; __atomic_load_n(finished, __ATOMIC_ACQUIRE) < wanted; tries++)
    if (tries > 200) sched_yield();
}

template <typename T, typename B>
void chunk_gradients(const AttentionBackward& call, View<float> grad_q, int64_t index, int64_t kv) {
  const AttentionShape& s = call.shape;
  const KeyChunk& chunk = call.chunks[index];
  int64_t group = s.heads / s.kv_heads, each = group_tokens(s), size = key_block(s);
  B b(s, round_up(each * group, B::kLanes), size);
  int64_t* finished = call.finished + index * s.kv_heads + kv;
  const int64_t* before = chunk.previous < 0 ? nullptr : call.finished + chunk.previous * s.kv_heads + kv;
  for (int64_t first = chunk.first; first < chunk.first + chunk.count; first += size) {
    Keys keys = {first, min_of(size, chunk.first + chunk.count - first), true};
    b.take_keys(call, {kv, 0, chunk.start, first, keys.count});
    int64_t end = min_of(chunk.length, first + keys.count - 1 + s.window);
    for (int64_t query = first; query < end; query += each) {
      int64_t count = min_of(each, end - query) * group;
      Lanes lanes = {chunk.start - s.skipped + query, count, round_up(count, B::kLanes), kv, group};
      Lanes placed = lanes;
      placed.first = query;
      for (int64_t m = 0; m < lanes.padded; m++) b.position[m] = int32_t(query + min_of(m, count - 1) / group);
      load_group(call, lanes, b);
      if (before) wait_for(before, query + count / group);
      group_gradients(s, lanes, placed, keys, grad_q, b);
      if (first + keys.count == chunk.first + chunk.count)
        __atomic_store_n(finished, query + count / group, __ATOMIC_RELEASE);
    }
    if (chunk.into_prefix) {
      put_partial(call, 0, kv, keys, b);
      continue;
    }
    View<T> grad_k(call.grad_k), grad_v(call.grad_v);
    b.put_gradients(s, keys.count, grad_k.at(chunk.start + first, kv), grad_k.token,
                    grad_v.at(chunk.start + first, kv), grad_v.token);
  }
  __atomic_store_n(finished, chunk.length, __ATOMIC_RELEASE);
}

// Positions of lanes that go on over the ends of rows, in the sequence that begins with the prefix.
inline void place_lanes(const AttentionBackward& call, const Lanes& lanes, int64_t& row, int32_t* position) {
  for (int64_t m = 0; m < lanes.padded; m++) {
    int64_t token = lanes.token(min_of(m, lanes.count - 1)) + call.shape.skipped;
    while (token >= call.starts[row + 1]) row++;
    position[m] = int32_t(call.shape.prefix + token - call.starts[row]);
  }
}

// What the tokens of one slice give to the prefix's keys, and these keys to the tokens' queries.
template <typename B>
void prefix_gradients(const AttentionBackward& call, View<float> grad_q, int64_t slice, int64_t kv) {
  const AttentionShape& s = call.shape;
  int64_t group = s.heads / s.kv_heads, each = group_tokens(s), size = key_block(s);
  B b(s, round_up(each * group, B::kLanes), size);
  int64_t tokens = call.starts[call.rows] - s.prefix, before = s.prefix - s.skipped;
  int64_t begin = before + tokens * slice / call.slices, end = before + tokens * (slice + 1) / call.slices;
  for (int64_t first = 0; first < s.prefix; first += size) {
    Keys keys = {first, min_of(size, s.prefix - first), false};
    b.take_keys(call, {kv, 0, 0, first, keys.count});
    int64_t row = 1;
    for (int64_t token = begin; token < end; token += each) {
      int64_t count = min_of(each, end - token) * group;
      Lanes lanes = {token, count, round_up(count, B::kLanes), kv, group};
      place_lanes(call, lanes, row, b.position);
      load_group(call, lanes, b);
      group_gradients(s, lanes, lanes, keys, grad_q, b);
    }
    put_partial(call, slice + 1, kv, keys, b);
  }
}

// delta = rowsum(dO * O) and zeros in the sums of dQ, for some tokens.
template <typename T>
void prepare_tokens(const AttentionBackward& call, View<float> grad_q, int64_t begin, int64_t end) {
  const AttentionShape& s = call.shape;
  View<const T> out(call.out), grad_out(call.grad_out);
  for (int64_t t = begin; t < end; t++)
    for (int64_t h = 0; h < s.heads; h++) {
      const T *x = out.at(t, h), *y = grad_out.at(t, h);
      quad total = quad{}, other = quad{};
      for (int64_t d = 0; d < s.value_dim; d += 8) {
        total += load4(x + d) * load4(y + d);
        other += load4(x + d + 4) * load4(y + d + 4);
      }
      total += other;
      call.delta[t * s.heads + h] = total[0] + total[1] + (total[2] + total[3]);
      memset(grad_q.at(t, h), 0, size_t(s.dim) * 4);
    }
}

// The prefix's gradients: its own row's, then each slice's.
template <typename T>
void sum_partials(const AttentionBackward& call, int64_t token, int64_t kv) {
  const AttentionShape& s = call.shape;
  int64_t each = s.dim + s.value_dim;
  View<T> grad_k(call.grad_k), grad_v(call.grad_v);
  for (int64_t d = 0; d < each; d += 4) {
    quad total = quad{};
    for (int64_t slot = call.prefix_has_queries ? 0 : 1; slot <= call.slices; slot++)
      total += load4(call.partial + ((slot * s.prefix + token) * s.kv_heads + kv) * each + d);
    store4(d < s.dim ? grad_k.at(token, kv) + d : grad_v.at(token, kv) + d - s.dim, total);
  }
}

}  // namespace
}  // namespace tunegate::TUNEGATE_LEVEL
