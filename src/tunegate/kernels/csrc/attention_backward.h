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

struct BackwardBuffers {
  float *q, *grad_out;            // columns, panel by panel: (dim, lanes), (value_dim, lanes)
  float *q_rows, *grad_out_rows;  // (lanes, dims padded to vectors), q times scale
  float *lse, *delta, *ones;
  int32_t* position;
  float *k, *v, *grad_k, *grad_v;  // (keys, dim); the gradients' dims padded to vectors
  float *p, *ds;                   // (keys, lanes)
  float* grad_q;                   // (dim, kPanel)
  BackwardBuffers(const AttentionShape& s, int64_t lanes, int64_t keys) {
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
};

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
  int64_t begin, end;  // rows of the chunk that some lane of the panel sees, in multiples of kRows
};

template <int N>
inline void backward_panel(const AttentionShape& s, const Lanes& lanes, const Keys& keys, int64_t m, PanelRange range,
                           BackwardBuffers& b) {
  constexpr int64_t width = N * W;
  int64_t stride = lanes.padded, rows = range.end - range.begin;
  float *p = b.p + range.begin * stride + m, *ds = b.ds + range.begin * stride + m;
  const float *k = b.k + range.begin * s.dim, *v = b.v + range.begin * s.value_dim;
  product<N, kFresh>(rows, {k, s.dim, 1}, b.q + m * s.dim, width, s.dim, p, stride);
  product<N, kFresh>(rows, {v, s.value_dim, 1}, b.grad_out + m * s.value_dim, width, s.value_dim, ds, stride);
  int64_t last = min_of(m + width, lanes.count) - 1;
  Softmax state = {s.window, b.position + m, b.position[m], b.position[last], keys.first + keys.count, nullptr, nullptr};
  if (!keys.causal) {
    for (int64_t i = m; i <= last; i++) {
      state.lowest = min_of(state.lowest, b.position[i]);
      state.highest = max_of(state.highest, b.position[i]);
    }
  }
  probabilities<N>(s, keys.first + range.begin, rows, stride, state, b.lse + m, b.delta + m, p, ds);
  product<N, kFresh>(s.dim, {k, 1, s.dim}, ds, stride, rows, b.grad_q, width);
}

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

template <typename T>
inline void load_group(const AttentionBackward& call, const Lanes& lanes, BackwardBuffers& b) {
  const AttentionShape& s = call.shape;
  View<const T> q(call.q), grad_out(call.grad_out);
  float factor = s.softcap > 0 ? s.scale / s.softcap : s.scale;
  for (int64_t m = 0; m < lanes.padded; m += kPanel) {
    int64_t width = min_of(kPanel, lanes.padded - m);
    pack_columns(q, lanes, m, width, s.dim, factor, b.q + m * s.dim);
    pack_columns(grad_out, lanes, m, width, s.value_dim, 1.0f, b.grad_out + m * s.value_dim);
  }
  pack_rows(q, lanes, s.dim, round_up(s.dim, W), s.scale, b.q_rows);
  pack_rows(grad_out, lanes, s.value_dim, round_up(s.value_dim, W), 1.0f, b.grad_out_rows);
  for (int64_t m = 0; m < lanes.padded; m++) {
    int64_t lane = min_of(m, lanes.count - 1), at = lanes.token(lane) * s.heads + lanes.head(lane);
    b.lse[m] = call.lse[at];
    b.delta[m] = call.delta[at];
    b.ones[m] = s.scale;
  }
}

inline PanelRange rows_seen(const AttentionShape& s, const Lanes& lanes, const Keys& keys, int64_t begin, int64_t end,
                            const int32_t* position) {
  int64_t lowest = position[begin], highest = lowest;
  for (int64_t i = begin; i < min_of(end, lanes.count); i++) {
    lowest = min_of(lowest, position[i]);
    highest = max_of(highest, position[i]);
  }
  int64_t from = max_of(0, lowest - s.window + 1 - keys.first) / kRows * kRows;
  int64_t to = round_up(max_of(0, min_of(keys.count, highest + 1 - keys.first)), kRows);
  return {min_of(from, to), to};
}

// One group of queries against the task's keys. grad_q: where its sums are kept, fp32.
// In-row positions for own keys; for the prefix's, positions in the sequence that begins with it.
inline void group_gradients(const AttentionShape& s, const Lanes& lanes, const Lanes& placed, const Keys& keys,
                            View<float> grad_q, BackwardBuffers& b) {
  PanelRange whole = rows_seen(s, lanes, keys, 0, lanes.count, b.position);
  if (whole.begin >= whole.end) return;
  for (int64_t m = 0; m < lanes.padded; m += kPanel) {
    int64_t width = min_of(kPanel, lanes.padded - m);
    PanelRange range = keys.causal ? rows_seen(s, lanes, keys, m, m + width, b.position) : whole;
    if (range.begin >= range.end) continue;
    if (width == 3 * W) backward_panel<3>(s, lanes, keys, m, range, b);
    if (width == 2 * W) backward_panel<2>(s, lanes, keys, m, range, b);
    if (width == W) backward_panel<1>(s, lanes, keys, m, range, b);
    unpack_columns<true>(b.grad_q, width, s.dim, b.ones + m, grad_q, lanes, m);
  }
  add_key_gradients(s, placed, keys, whole, b.p, b.grad_out_rows, b.grad_v, round_up(s.value_dim, W));
  add_key_gradients(s, placed, keys, whole, b.ds, b.q_rows, b.grad_k, round_up(s.dim, W));
}

inline int64_t group_tokens(const AttentionShape& s) {
  return max_of(1, kGroupLanes / (s.heads / s.kv_heads));
}

inline void clear_key_gradients(const AttentionShape& s, const Keys& keys, BackwardBuffers& b) {
  size_t rows = size_t(round_up(keys.count, kRows)) * 4;
  memset(b.grad_k, 0, rows * size_t(round_up(s.dim, W)));
  memset(b.grad_v, 0, rows * size_t(round_up(s.value_dim, W)));
}

// A task's sums to their place: (keys, dim) at the head of a view, or of the partial sums of slice number slot.
template <typename T>
inline void put_rows(const float* from, int64_t stride, int64_t count, int64_t dim, T* to, int64_t step) {
  for (int64_t n = 0; n < count; n++)
    for (int64_t d = 0; d < dim; d += 4) store4(to + n * step + d, load4(from + n * stride + d));
}

inline void put_partial(const AttentionBackward& call, int64_t slot, int64_t kv, const Keys& keys,
                        const BackwardBuffers& b) {
  const AttentionShape& s = call.shape;
  int64_t each = s.dim + s.value_dim, step = s.kv_heads * each;
  float* to = call.partial + (slot * s.prefix + keys.first) * step + kv * each;
  put_rows(b.grad_k, round_up(s.dim, W), keys.count, s.dim, to, step);
  put_rows(b.grad_v, round_up(s.value_dim, W), keys.count, s.value_dim, to + s.dim, step);
}

inline void wait_for(const int64_t* finished, int64_t wanted) {
  for (int tries = 0; __atomic_load_n(finished, __ATOMIC_ACQUIRE) < wanted; tries++)
    if (tries > 200) sched_yield();
}

template <typename T>
void chunk_gradients(const AttentionBackward& call, View<float> grad_q, int64_t index, int64_t kv) {
  const AttentionShape& s = call.shape;
  const KeyChunk& chunk = call.chunks[index];
  int64_t group = s.heads / s.kv_heads, each = group_tokens(s), size = key_block(s);
  BackwardBuffers b(s, round_up(each * group, W), size);
  int64_t* finished = call.finished + index * s.kv_heads + kv;
  const int64_t* before = chunk.previous < 0 ? nullptr : call.finished + chunk.previous * s.kv_heads + kv;
  for (int64_t first = chunk.first; first < chunk.first + chunk.count; first += size) {
    Keys keys = {first, min_of(size, chunk.first + chunk.count - first), true};
    gather(View<const T>(call.k), kv, 0, chunk.start, first, keys.count, s.dim, b.k);
    gather(View<const T>(call.v), kv, 0, chunk.start, first, keys.count, s.value_dim, b.v);
    clear_key_gradients(s, keys, b);
    int64_t end = min_of(chunk.length, first + keys.count - 1 + s.window);
    for (int64_t query = first; query < end; query += each) {
      int64_t count = min_of(each, end - query) * group;
      Lanes lanes = {chunk.start - s.skipped + query, count, round_up(count, W), kv, group};
      Lanes placed = lanes;
      placed.first = query;
      for (int64_t m = 0; m < lanes.padded; m++) b.position[m] = int32_t(query + min_of(m, count - 1) / group);
      load_group<T>(call, lanes, b);
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
    put_rows(b.grad_k, round_up(s.dim, W), keys.count, s.dim, grad_k.at(chunk.start + first, kv), grad_k.token);
    put_rows(b.grad_v, round_up(s.value_dim, W), keys.count, s.value_dim, grad_v.at(chunk.start + first, kv),
             grad_v.token);
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
template <typename T>
void prefix_gradients(const AttentionBackward& call, View<float> grad_q, int64_t slice, int64_t kv) {
  const AttentionShape& s = call.shape;
  int64_t group = s.heads / s.kv_heads, each = group_tokens(s), size = key_block(s);
  BackwardBuffers b(s, round_up(each * group, W), size);
  int64_t tokens = call.starts[call.rows] - s.prefix, before = s.prefix - s.skipped;
  int64_t begin = before + tokens * slice / call.slices, end = before + tokens * (slice + 1) / call.slices;
  for (int64_t first = 0; first < s.prefix; first += size) {
    Keys keys = {first, min_of(size, s.prefix - first), false};
    gather(View<const T>(call.k), kv, 0, 0, first, keys.count, s.dim, b.k);
    gather(View<const T>(call.v), kv, 0, 0, first, keys.count, s.value_dim, b.v);
    clear_key_gradients(s, keys, b);
    int64_t row = 1;
    for (int64_t token = begin; token < end; token += each) {
      int64_t count = min_of(each, end - token) * group;
      Lanes lanes = {token, count, round_up(count, W), kv, group};
      place_lanes(call, lanes, row, b.position);
      load_group<T>(call, lanes, b);
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
