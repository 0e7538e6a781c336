// Part of attention.cpp: decode attention, one query a row.
//
// The shared prefix is attended by all rows of a task at once, in lanes, as in forward; a row's own keys are read
// once, as they lie, for all heads that share them. The two partial softmaxes meet at the end.
#pragma once
#include "attention_forward.h"

namespace tunegate::TUNEGATE_LEVEL {
namespace {

inline quad fold(vfloat x) {  // lanes i, i + 4, ... added
  float lanes[W];
  store(lanes, x);
  quad total = load4(lanes);
  for (int i = 4; i < W; i += 4) total += load4(lanes + i);
  return total;
}

// Scores of one query and four keys.
template <typename T>
inline quad four_scores(const float* q, const T* keys, int64_t step, int64_t dim) {
  vfloat sums[4] = {};
  for (int64_t d = 0; d < dim; d += W) {
    vfloat query = load(q + d);
    for (int i = 0; i < 4; i++) sums[i] += query * load(keys + i * step + d);
  }
  quad a = fold(sums[0]), b = fold(sums[1]), c = fold(sums[2]), d = fold(sums[3]);
  transpose4(a, b, c, d);
  return (a + b) + (c + d);
}

struct OwnKeys {
  int64_t count, dim, value_dim, key_step, value_step;
};

// out[g] = sum over keys of exp(score - maximum[g]) value, and the sum of the weights. scores: (group, stride).
// Vectors of dim and value_dim are whole.
template <typename T>
inline void own_attention(const AttentionShape& s, const float* q, const T* k, const T* v, const OwnKeys& own,
                          int64_t group, float* scores, int64_t stride, float* maximum, float* total, float* out) {
  for (int64_t n = 0; n < own.count; n += 4) {
    int64_t from = max_of(0, min_of(n, own.count - 4));
    if (own.count < 4) break;
    for (int64_t g = 0; g < group; g++)
      store4(scores + g * stride + from, four_scores(q + g * own.dim, k + from * own.key_step, own.key_step, own.dim));
  }
  for (int64_t g = 0; g < group; g++) {
    float* row = scores + g * stride;
    if (own.count < 4)
      for (int64_t n = 0; n < own.count; n++) row[n] = four_scores(q + g * own.dim, k + n * own.key_step, 0, own.dim)[0];
    int64_t padded = round_up(own.count, W);
    for (int64_t n = own.count; n < padded; n++) row[n] = -INFINITY;
    vfloat top = splat(kLowest), sum_of = vfloat{};
    for (int64_t n = 0; n < padded; n += W) {
      vfloat score = load(row + n);
      if (s.softcap > 0) {
        vint none = (vint)(score == splat(-INFINITY));
        score = select(none, score, vtanh(score) * s.softcap);
        store(row + n, score);
      }
      top = vmax(score, top);
    }
    maximum[g] = largest(top);
    for (int64_t n = 0; n < padded; n += W) {
      vfloat weight = exp_down(load(row + n) - maximum[g]);
      store(row + n, weight);
      sum_of += weight;
    }
    total[g] = sum(sum_of);
  }
  for (int64_t d = 0; d < own.value_dim;) {
    int64_t vectors = min_of(kPanel, own.value_dim - d) / W;
    for (int64_t g = 0; g < group; g++) {
      Operand weights = {scores + g * stride, stride, 1};
      float* to = out + g * own.value_dim + d;
      if (vectors == 3) tile<1, 3, kFresh>(weights, v + d, own.value_step, own.count, to, own.value_dim, nullptr);
      if (vectors == 2) tile<1, 2, kFresh>(weights, v + d, own.value_step, own.count, to, own.value_dim, nullptr);
      if (vectors == 1) tile<1, 1, kFresh>(weights, v + d, own.value_step, own.count, to, own.value_dim, nullptr);
    }
    d += vectors * W;
  }
}

// Rows widened and padded to whole vectors, for dims that are not.
template <typename T>
inline void pad_rows(const T* from, int64_t step, int64_t count, int64_t dim, float* to) {
  int64_t wide = round_up(dim, W);
  for (int64_t n = 0; n < count; n++) {
    for (int64_t d = 0; d < dim; d += 4) store4(to + n * wide + d, load4(from + n * step + d));
    for (int64_t d = dim; d < wide; d++) to[n * wide + d] = 0.0f;
  }
}

struct DecodeBuffers {
  float *q, *scores, *maximum, *total, *out, *k, *v;
  int64_t stride;
  DecodeBuffers(const AttentionShape& s, int64_t group, int64_t longest, bool copies) {
    int64_t wide = round_up(s.dim, W), value_wide = round_up(s.value_dim, W), copied = copies ? longest : 0;
    stride = round_up(longest, W);
    int64_t floats = group * (wide + value_wide + stride + 2) + copied * (wide + value_wide) + 16 * 8;
    float* p = static_cast<float*>(scratch(floats * 4 + 512, 1));
    auto take = [&p](int64_t n) {
      float* at = p;
      p += round_up(n, 16);
      return at;
    };
    q = take(group * wide);
    scores = take(group * stride);
    maximum = take(group);
    total = take(group);
    out = take(group * value_wide);
    k = take(copied * wide);
    v = take(copied * value_wide);
  }
};

// One row's own keys: unnormalised output, maximum and sum into b.
template <typename T>
inline void own_part(const DecodeAttention& call, int64_t row, int64_t kv, int64_t group, DecodeBuffers& b,
                     bool copies) {
  const AttentionShape& s = call.shape;
  int64_t length = call.lengths[row], first = max_of(0, length - s.window), count = length - first;
  int64_t wide = round_up(s.dim, W), value_wide = round_up(s.value_dim, W);
  float factor = s.softcap > 0 ? s.scale / s.softcap : s.scale;
  View<const T> q(call.q);
  pad_rows(q.at(row, kv * group), q.head, group, s.dim, b.q);
  for (int64_t i = 0; i < group * wide; i++) b.q[i] *= factor;
  const T* k = static_cast<const T*>(call.key) + row * call.key_row + kv * call.key_head + first * s.dim;
  const T* v = static_cast<const T*>(call.value) + row * call.value_row + kv * call.value_head + first * s.value_dim;
  OwnKeys own = {count, wide, value_wide, wide, value_wide};
  if (!copies)
    return own_attention(s, b.q, k, v, own, group, b.scores, b.stride, b.maximum, b.total, b.out);
  pad_rows(k, s.dim, count, s.dim, b.k);
  pad_rows(v, s.value_dim, count, s.value_dim, b.v);
  own_attention<float>(s, b.q, b.k, b.v, own, group, b.scores, b.stride, b.maximum, b.total, b.out);
}

// The prefix's part for all lanes of the task: state in b.
template <typename F>
inline void prefix_part(const DecodeAttention& call, const Lanes& lanes, F& b) {
  const AttentionShape& s = call.shape;
  int64_t size = key_block(s);
  b.begin(s, call.q, lanes);
  for (int64_t m = 0; m < lanes.padded; m++)
    b.position[m] = int32_t(s.prefix + call.lengths[lanes.token(min_of(m, lanes.count - 1))] - 1);
  for (int64_t first = 0; first < s.prefix; first += size) {
    int64_t count = min_of(size, s.prefix - first);
    b.take_keys(s, call.prefix_key, call.prefix_value, {lanes.kv, 0, 0, first, count});
    for (int64_t m = 0; m < lanes.padded; m += F::kWidth) {
      int64_t width = min_of(F::kWidth, lanes.padded - m), lowest = b.position[m], highest = lowest;
      for (int64_t i = m; i < m + width; i++) {
        lowest = min_of(lowest, b.position[i]);
        highest = max_of(highest, b.position[i]);
      }
      Softmax state = {s.window, b.position + m, lowest, highest, s.prefix, b.maximum + m, b.total + m};
      if (first + count <= lowest - s.window + 1) continue;
      b.panel(s, m, width, 0, round_up(count, F::kStep), first, state);
    }
  }
}

template <typename T, typename F>
void decode_rows(const DecodeAttention& call, int64_t begin, int64_t end, int64_t kv) {
  const AttentionShape& s = call.shape;
  int64_t group = s.heads / s.kv_heads, value_wide = round_up(s.value_dim, W), longest = 0;
  bool copies = s.dim % W || s.value_dim % W;
  for (int64_t row = begin; row < end; row++) longest = max_of(longest, min_of(call.lengths[row], s.window));
  Lanes lanes = {begin, (end - begin) * group, round_up((end - begin) * group, F::kLanes), kv, group};
  F shared(s, lanes.padded, key_block(s));
  DecodeBuffers b(s, group, longest, copies);
  if (s.prefix) prefix_part(call, lanes, shared);
  View<T> out(call.out);
  for (int64_t row = begin; row < end; row++) {
    own_part<T>(call, row, kv, group, b, copies);
    for (int64_t g = 0; g < group; g++) {
      int64_t lane = (row - begin) * group + g;
      float mine = 1.0f, other = 0.0f;
      if (s.prefix) {
        float top = b.maximum[g] > shared.maximum[lane] ? b.maximum[g] : shared.maximum[lane];
        mine = expf(b.maximum[g] - top);
        other = expf(shared.maximum[lane] - top);
        float total = b.total[g] * mine + shared.total[lane] * other;
        mine /= total;
        other /= total;
      } else {
        mine = 1.0f / b.total[g];
      }
      int64_t panel = lane / F::kWidth * F::kWidth, width = min_of(F::kWidth, lanes.padded - panel);
      const float* column = shared.panel_out(s, panel) + lane - panel;
      T* to = out.at(row, kv * group + g);
      for (int64_t d = 0; d < s.value_dim; d++) {
        float x = b.out[g * value_wide + d] * mine;
        set(to + d, s.prefix ? x + column[d * width] * other : x);
      }
    }
  }
}

}  // namespace
}  // namespace tunegate::TUNEGATE_LEVEL
