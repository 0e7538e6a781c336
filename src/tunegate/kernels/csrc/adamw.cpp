#include "adamw.h"

#include "level.h"
#include "pool.h"

namespace tunegate::TUNEGATE_LEVEL {
namespace {

// Half as many lanes, so that a vector of doubles is one register.
typedef float vnarrow __attribute__((vector_size(W * 2)));
typedef double vdouble __attribute__((vector_size(W * 4)));

// body(tensor, begin, end) for each piece of a tensor that a task of the row holds.
template <typename F>
inline void for_pieces(const TensorRow& row, int64_t task, F&& body) {
  int64_t from = task * kAdamwTask, to = min_of(row.starts[row.count], from + kAdamwTask);
  int64_t low = 0, high = row.count;  // the last tensor that starts at or before `from`
  while (high - low > 1) {
    int64_t middle = (low + high) / 2;
    (row.starts[middle] <= from ? low : high) = middle;
  }
  for (int64_t i = low; i < row.count && row.starts[i] < to; i++) {
    int64_t begin = max_of(from, row.starts[i]) - row.starts[i];
    int64_t end = min_of(to, row.starts[i + 1]) - row.starts[i];
    if (begin < end) body(i, begin, end);
  }
}

template <typename F>
inline void for_tasks(const TensorRow& row, F&& body) {
  parallel((row.starts[row.count] + kAdamwTask - 1) / kAdamwTask, [&](int64_t task) { body(task); });
}

inline vfloat vsqrt(vfloat v) {
  float lanes[W];
  store(lanes, v);
  for (int i = 0; i < W; i++) lanes[i] = __builtin_sqrtf(lanes[i]);
  return load(lanes);
}

struct Moment {
  vfloat parameter, first, second;
};

inline Moment advance(Moment at, vfloat g, const AdamwGroup& by) {
  at.first += (g - at.first) * by.beta1_rest;
  at.second = at.second * by.beta2 + g * g * by.beta2_rest;
  vfloat denominator = vsqrt(at.second) * by.inverse_root + by.eps;
  at.parameter = at.parameter * by.keep - at.first / denominator * by.step_size;
  return at;
}

// --- moments in 8 bits ---

constexpr int32_t kLowestKey = 104 << 7, kLastKey = (127 << 7) - kLowestKey;  // of 2^-23 and of 1
constexpr int32_t kZeroCode = 127;
constexpr float kLeastScale = 1e-38f;  // below it 1 / scale may overflow

inline int32_t rank_of(float magnitude, const Codebook& book) {
  int32_t key;
  memcpy(&key, &magnitude, 4);
  key = (key >> 16) - kLowestKey;
  key = key < 0 ? 0 : key > kLastKey ? kLastKey : key;
  int32_t rank = book.starts[key];
  return rank + (magnitude > book.bounds[rank]);
}

inline void decode(const uint8_t* codes, int64_t n, float scale, const float* values, float* out) {
  for (int64_t i = 0; i < n; i++) out[i] = values[codes[i]] * scale;
  for (int64_t i = n; i < kAdamw8Block; i++) out[i] = 0.0f;
}

template <bool has_sign>
inline float encode(const float* x, int64_t n, const Codebook& book, uint8_t* codes) {
  vfloat most = {};
  for (int64_t i = 0; i < kAdamw8Block; i += W) most = vmax((vfloat)((vint)load(x + i) & 0x7fffffff), most);
  float scale = largest(most), inverse = scale > kLeastScale ? 1.0f / scale : 0.0f;
  for (int64_t i = 0; i < n; i++) {
    float scaled = x[i] * inverse;
    int32_t rank = rank_of(fabsf(scaled), book);
    if constexpr (has_sign) {
      int32_t below = rank < kZeroCode ? rank : kZeroCode;  // there is no -1
      rank = scaled < 0 ? kZeroCode - below : kZeroCode + rank;
    }
    codes[i] = uint8_t(rank);
  }
  return scale;
}

inline void advance_block(const Adamw8Tensor& t, int64_t at, const AdamwGroup& by, const Codebook& with_sign,
                          const Codebook& without_sign) {
  alignas(64) float first[kAdamw8Block], second[kAdamw8Block];
  int64_t n = min_of(kAdamw8Block, t.count - at), block = at / kAdamw8Block;
  decode(t.first + at, n, t.first_scales[block], with_sign.values, first);
  decode(t.second + at, n, t.second_scales[block], without_sign.values, second);
  float* p = t.parameter + at;
  const float* g = t.gradient + at;
  for (int64_t i = 0; i < n; i += W) {
    int64_t rest = n - i;
    vfloat parameter = rest < W ? load_part(p + i, rest) : load(p + i);
    vfloat gradient = rest < W ? load_part(g + i, rest) : load(g + i);
    Moment to = advance({parameter, load(first + i), load(second + i)}, gradient, by);
    rest < W ? store_part(p + i, to.parameter, rest) : store(p + i, to.parameter);
    store(first + i, to.first);
    store(second + i, to.second);
  }
  t.first_scales[block] = encode<true>(first, n, with_sign, t.first + at);
  t.second_scales[block] = encode<false>(second, n, without_sign, t.second + at);
}

// The sum of squares in fp64, in four chains.
struct Squares {
  vdouble low[2] = {}, high[2] = {};
  void add(vfloat v, int chain) {
    vnarrow halves[2];
    memcpy(halves, &v, sizeof v);
    vdouble first = __builtin_convertvector(halves[0], vdouble), second = __builtin_convertvector(halves[1], vdouble);
    low[chain] += first * first;
    high[chain] += second * second;
  }
  double total() const {
    vdouble all = (low[0] + low[1]) + (high[0] + high[1]);
    double lanes[W / 2], sum = 0;
    memcpy(lanes, &all, sizeof lanes);
    for (double lane : lanes) sum += lane;
    return sum;
  }
};

template <bool writes>
void squares_of(const TensorRow& row, float* const* gradients, float scale, double* partials) {
  for_tasks(row, [&](int64_t task) {
    Squares squares;
    for_pieces(row, task, [&](int64_t index, int64_t i, int64_t end) {
      float* g = gradients[index];
      for (; i + 2 * W <= end; i += 2 * W)
        for (int k = 0; k < 2; k++) {
          vfloat v = load(g + i + k * W) * scale;
          squares.add(v, k);
          if constexpr (writes) store(g + i + k * W, v);
        }
      for (; i < end; i += W) {
        int64_t n = min_of(W, end - i);
        vfloat v = load_part(g + i, n) * scale;
        squares.add(v, 0);
        if constexpr (writes) store_part(g + i, v, n);
      }
    });
    partials[task] = squares.total();
  });
}

}  // namespace

void adamw(TensorRow row, const AdamwTensor* tensors, const AdamwGroup* groups) {
  for_tasks(row, [&](int64_t task) {
    for_pieces(row, task, [&](int64_t index, int64_t i, int64_t end) {
      AdamwTensor t = tensors[index];
      AdamwGroup by = groups[t.group];
      for (; i + W <= end; i += W) {
        Moment to = advance({load(t.parameter + i), load(t.first + i), load(t.second + i)}, load(t.gradient + i), by);
        store(t.parameter + i, to.parameter);
        store(t.first + i, to.first);
        store(t.second + i, to.second);
      }
      if (i < end) {
        int64_t n = end - i;
        Moment to = advance({load_part(t.parameter + i, n), load_part(t.first + i, n), load_part(t.second + i, n)},
                            load_part(t.gradient + i, n), by);
        store_part(t.parameter + i, to.parameter, n);
        store_part(t.first + i, to.first, n);
        store_part(t.second + i, to.second, n);
      }
    });
  });
}

void adamw8(TensorRow row, const Adamw8Tensor* tensors, const AdamwGroup* groups, const Codebook& with_sign,
            const Codebook& without_sign) {
  for_tasks(row, [&](int64_t task) {
    for_pieces(row, task, [&](int64_t index, int64_t begin, int64_t end) {
      const Adamw8Tensor& t = tensors[index];
      for (int64_t at = begin; at < end; at += kAdamw8Block)
        advance_block(t, at, groups[t.group], with_sign, without_sign);
    });
  });
}

void gradient_squares(TensorRow row, float* const* gradients, float scale, bool writes, double* partials) {
  writes ? squares_of<true>(row, gradients, scale, partials) : squares_of<false>(row, gradients, scale, partials);
}

void scale_gradients(TensorRow row, float* const* gradients, float scale, float coefficient) {
  for_tasks(row, [&](int64_t task) {
    for_pieces(row, task, [&](int64_t index, int64_t i, int64_t end) {
      float* g = gradients[index];
      for (; i < end; i++) g[i] = g[i] * scale * coefficient;
    });
  });
}

}  // namespace tunegate::TUNEGATE_LEVEL
