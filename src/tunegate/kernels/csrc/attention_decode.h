// Part of attention.cpp: decode attention, one query a row.
//
// The shared prefix is attended by all rows of a task at once, in lanes, as in forward; a row's own keys are read
// once, as they lie in their pages, for all heads that share them. The two partial softmaxes meet at the end.
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

// Scores of all heads of a group with keys that lie one after the other. scores: (group, stride).
template <typename T>
inline void run_scores(const float* q, const T* keys, int64_t dim, int64_t count, int64_t group, float* scores,
                       int64_t stride) {
  for (int64_t n = 0; n < count; n += 4) {
    int64_t from = min_of(n, count - 4);
    for (int64_t g = 0; g < group; g++) {
      const float* query = q + g * dim;
      float* to = scores + g * stride;
      if (from >= 0)
        store4(to + from, four_scores(query, keys + from * dim, dim, dim));
      else
        for (int64_t i = 0; i < count; i++) to[i] = four_scores(query, keys + i * dim, 0, dim)[0];
    }
  }
}

// out[g] = start + sum of weight * value over values that lie one after the other.
template <Start S, typename T>
inline void run_values(const float* weights, int64_t stride, const T* values, int64_t dim, int64_t count,
                       int64_t group, float* out) {
  for (int64_t d = 0; d < dim;) {
    int64_t vectors = min_of(kPanel, dim - d) / W;
    for (int64_t g = 0; g < group; g++) {
      Operand left = {weights + g * stride, stride, 1};
      float* to = out + g * dim + d;
      if (vectors == 3) tile<1, 3, S>(left, values + d, dim, count, to, dim, nullptr);
      if (vectors == 2) tile<1, 2, S>(left, values + d, dim, count, to, dim, nullptr);
      if (vectors == 1) tile<1, 1, S>(left, values + d, dim, count, to, dim, nullptr);
    }
    d += vectors * W;
  }
}

// Scores of count keys become exp(score - maximum), and their sum the total.
inline void own_softmax(const AttentionShape& s, float* row, int64_t count, float* maximum, float* total) {
  int64_t padded = round_up(count, W);
  for (int64_t n = count; n < padded; n++) row[n] = -INFINITY;
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
  *maximum = largest(top);
  for (int64_t n = 0; n < padded; n += W) {
    vfloat weight = exp_down(load(row + n) - *maximum);
    store(row + n, weight);
    sum_of += weight;
  }
  *total = sum(sum_of);
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
  float *q, *scores, *maximum, *total, *out, *copy;
  int64_t stride;
  // copied: places of a page whose rows have to be padded to whole vectors, else 0
  DecodeBuffers(const AttentionShape& s, int64_t group, int64_t longest, int64_t copied) {
    int64_t wide = round_up(s.dim, W), value_wide = round_up(s.value_dim, W);
    stride = round_up(longest, W);
    int64_t floats = group * (wide + value_wide + stride + 2) + copied * max_of(wide, value_wide) + 16 * 8;
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
    copy = take(copied * max_of(wide, value_wide));
  }
};

// A row's own keys and values of one kv head, in runs that lie densely: body(key number, page, place, count).
template <typename F>
inline void each_run(const DecodeAttention& call, int64_t row, int64_t first, F&& body) {
  int64_t length = call.lengths[row];
  const int64_t* pages = call.pages + row * call.pages_each;
  for (int64_t n = first; n < length;) {
    int64_t place = n % call.page_places, count = min_of(call.page_places - place, length - n);
    body(n - first, pages[n / call.page_places], place, count);
    n += count;
  }
}

template <typename T>
inline void put_new(const DecodeAttention& call, int64_t row, int64_t kv) {
  const AttentionShape& s = call.shape;
  int64_t last = call.lengths[row] - 1, page = call.pages[row * call.pages_each + last / call.page_places];
  int64_t place = last % call.page_places;
  T* key = static_cast<T*>(call.key) + page * call.key_page + kv * call.key_head + place * s.dim;
  T* value = static_cast<T*>(call.value) + page * call.value_page + kv * call.value_head + place * s.value_dim;
  memcpy(key, View<const T>(call.new_key).at(row, kv), size_t(s.dim) * sizeof(T));
  memcpy(value, View<const T>(call.new_value).at(row, kv), size_t(s.value_dim) * sizeof(T));
}

// One row's own keys: unnormalised output, maximum and sum into b.
template <typename T>
inline void own_part(const DecodeAttention& call, int64_t row, int64_t kv, int64_t group, DecodeBuffers& b,
                     bool copies) {
  const AttentionShape& s = call.shape;
  int64_t first = max_of(0, call.lengths[row] - s.window), count = call.lengths[row] - first;
  int64_t wide = round_up(s.dim, W), value_wide = round_up(s.value_dim, W);
  float factor = s.softcap > 0 ? s.scale / s.softcap : s.scale;
  View<const T> q(call.q);
  pad_rows(q.at(row, kv * group), q.head, group, s.dim, b.q);
  for (int64_t i = 0; i < group * wide; i++) b.q[i] *= factor;
  each_run(call, row, first, [&](int64_t n, int64_t page, int64_t place, int64_t some) {
    const T* k = static_cast<const T*>(call.key) + page * call.key_page + kv * call.key_head + place * s.dim;
    if (!copies) return run_scores(b.q, k, wide, some, group, b.scores + n, b.stride);
    pad_rows(k, s.dim, some, s.dim, b.copy);
    run_scores(b.q, b.copy, wide, some, group, b.scores + n, b.stride);
  });
  for (int64_t g = 0; g < group; g++) own_softmax(s, b.scores + g * b.stride, count, b.maximum + g, b.total + g);
  memset(b.out, 0, size_t(group * value_wide) * 4);
  each_run(call, row, first, [&](int64_t n, int64_t page, int64_t place, int64_t some) {
    const T* v = static_cast<const T*>(call.value) + page * call.value_page + kv * call.value_head + place * s.value_dim;
    if (!copies) return run_values<kAdd>(b.scores + n, b.stride, v, value_wide, some, group, b.out);
    pad_rows(v, s.value_dim, some, s.value_dim, b.copy);
    run_values<kAdd>(b.scores + n, b.stride, b.copy, value_wide, some, group, b.out);
  });
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
  DecodeBuffers b(s, group, longest, copies ? min_of(call.page_places, longest) : 0);
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
