// Parts of attention.cpp: the register-blocked product and the packing of queries and keys.
//
// Scores are kept transposed, keys by queries, with the queries in the vector lanes. Keys and values are then
// broadcast from their natural layout and need no packing but a widening copy; the softmax's maxima and sums run
// across vectors, never within one; and one product serves all five matrix products of forward and backward.
#pragma once
#include "attention.h"
#include "level.h"
#include "pool.h"

namespace tunegate::TUNEGATE_LEVEL {
namespace {

constexpr int kRows = W == 16 ? 8 : 4;  // kRows x kVectors accumulators fill 32 or 16 registers
constexpr int kVectors = 3;
constexpr int64_t kPanel = kVectors * W;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// e^x for x below about 88, as exact as vexp; 0 below -87 and at -inf, NaN for NaN.
inline vfloat exp_down(vfloat x) {
  const vfloat low = splat(-87.0f);
  vint under = (vint)(x < low);
  vfloat kept = select(under, low, x);
  vint n;
  vfloat p = exp_parts(kept, &n);
  vfloat result = p * (vfloat)((n + 127) << 23);
  return (vfloat)(~under & (vint)result);
}

template <typename T>
struct View {
  T* data;
  int64_t token, head;
  explicit View(const TokenView& v) : data(static_cast<T*>(v.data)), token(v.token), head(v.head) {}
  T* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

struct Arena {  // carves a thread's scratch buffer
  float* next;
  explicit Arena(int64_t floats) : next(static_cast<float*>(scratch(floats * 4 + 64 * 32, 0))) {}
  float* take(int64_t floats) {
    float* p = next;
    next += round_up(floats, 16);
    return p;
  }
};

enum Start { kFresh, kAdd, kRescale };

struct Operand {  // element (i, k) of a left factor
  const float* data;
  int64_t row, step;
};

// c[i][j] = start + sum_k a(i, k) b[k][j] for R rows and N vectors; kRescale starts from c[i][j] * factor[j].
template <int R, int N, Start S, typename B>
inline __attribute__((always_inline)) void tile(Operand a, const B* b, int64_t b_step, int64_t depth, float* c,
                                                int64_t c_row, const float* factor) {
  vfloat sums[R][N];
  for (int i = 0; i < R; i++)
    for (int j = 0; j < N; j++) {
      if (S == kFresh) sums[i][j] = vfloat{};
      if (S == kAdd) sums[i][j] = load(c + i * c_row + j * W);
      if (S == kRescale) sums[i][j] = load(c + i * c_row + j * W) * load(factor + j * W);
    }
  for (int64_t k = 0; k < depth; k++) {
    vfloat right[N];
    for (int j = 0; j < N; j++) right[j] = load(b + k * b_step + j * W);
    for (int i = 0; i < R; i++) {
      vfloat left = splat(a.data[i * a.row + k * a.step]);
      for (int j = 0; j < N; j++) sums[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < R; i++)
    for (int j = 0; j < N; j++) store(c + i * c_row + j * W, sums[i][j]);
}

// The same for any multiple of kRows rows.
template <int N, Start S>
inline void product(int64_t rows, Operand a, const float* b, int64_t b_step, int64_t depth, float* c, int64_t c_row,
                    const float* factor = nullptr) {
  for (int64_t i = 0; i < rows; i += kRows) {
    Operand part = {a.data + i * a.row, a.row, a.step};
    tile<kRows, N, S>(part, b, b_step, depth, c + i * c_row, c_row, factor);
  }
}

// One kv head's part of some consecutive query tokens: lane m is token first + m / group, head m % group of the group.
struct Lanes {
  int64_t first, count, padded, kv, group;  // count of lanes; padded to vectors
  int64_t token(int64_t lane) const { return first + lane / group; }
  int64_t head(int64_t lane) const { return kv * group + lane % group; }
};

// Lanes begin .. begin + width - 1 as columns: to[d][lane] = factor * x[lane][d], zero past the last lane.
template <typename T>
inline void pack_columns(View<const T> x, const Lanes& lanes, int64_t begin, int64_t width, int64_t dim, float factor,
                         float* to) {
  for (int64_t m = 0; m < width; m += 4) {
    const T* row[4];
    quad keep[4];
    for (int i = 0; i < 4; i++) {
      int64_t lane = min_of(begin + m + i, lanes.count - 1);
      row[i] = x.at(lanes.token(lane), lanes.head(lane));
      keep[i] = (begin + m + i < lanes.count ? factor : 0.0f) - quad{};
    }
    for (int64_t d = 0; d < dim; d += 4) {
      quad a = load4(row[0] + d) * keep[0], b = load4(row[1] + d) * keep[1];
      quad e = load4(row[2] + d) * keep[2], f = load4(row[3] + d) * keep[3];
      transpose4(a, b, e, f);
      float* p = to + d * width + m;
      store4(p, a);
      store4(p + width, b);
      store4(p + 2 * width, e);
      store4(p + 3 * width, f);
    }
  }
}

// to[lane][d] = factor * x[lane][d], dim padded with zeros to stride.
template <typename T>
inline void pack_rows(View<const T> x, const Lanes& lanes, int64_t dim, int64_t stride, float factor, float* to) {
  for (int64_t m = 0; m < lanes.count; m++) {
    const T* row = x.at(lanes.token(m), lanes.head(m));
    for (int64_t d = 0; d < dim; d += 4) store4(to + m * stride + d, load4(row + d) * factor);
    for (int64_t d = dim; d < stride; d++) to[m * stride + d] = 0.0f;
  }
}

// Rows of one head, widened, then zero rows up to padded.
template <typename T>
inline void copy_rows(const T* from, int64_t step, int64_t count, int64_t dim, float* to) {
  for (int64_t n = 0; n < count; n++)
    for (int64_t d = 0; d < dim; d += 4) store4(to + n * dim + d, load4(from + n * step + d));
}

// Keys first .. first + count - 1 of the sequence "prefix, then the row's own tokens from start on", of one kv head.
struct KeyRange {
  int64_t kv, prefix, start, first, count;
};

template <typename T>
inline void gather(View<const T> x, const KeyRange& r, int64_t dim, float* to) {
  int64_t shared = max_of(0, min_of(r.prefix, r.first + r.count) - r.first);
  copy_rows(x.at(r.first, r.kv), x.token, shared, dim, to);
  copy_rows(x.at(r.start + r.first + shared - r.prefix, r.kv), x.token, r.count - shared, dim, to + shared * dim);
  memset(to + r.count * dim, 0, size_t((round_up(r.count, kRows) - r.count) * dim) * 4);
}

// y[lane][d] (+)= x[d][lane] * factor[lane] for the real lanes of a panel.
template <bool Add, typename T>
inline void unpack_columns(const float* x, int64_t width, int64_t dim, const float* factor, View<T> y,
                           const Lanes& lanes, int64_t begin) {
  for (int64_t m = 0; m < width && begin + m < lanes.count; m += 4) {
    T* row[4];
    int real = int(min_of(4, lanes.count - begin - m));
    for (int i = 0; i < real; i++) row[i] = y.at(lanes.token(begin + m + i), lanes.head(begin + m + i));
    quad times = load4(factor + m);
    for (int64_t d = 0; d < dim; d += 4) {
      const float* p = x + d * width + m;
      quad part[4];
      for (int i = 0; i < 4; i++) part[i] = load4(p + i * width) * times;
      transpose4(part[0], part[1], part[2], part[3]);
      for (int i = 0; i < real; i++) store4(row[i] + d, Add ? part[i] + load4(row[i] + d) : part[i]);
    }
  }
}

}  // namespace
}  // namespace tunegate::TUNEGATE_LEVEL
