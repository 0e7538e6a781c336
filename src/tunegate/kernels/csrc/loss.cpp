#include "loss.h"

#include "level.h"
#include "pool.h"

namespace tunegate::TUNEGATE_LEVEL {
namespace {

// f(column, vector, lanes in use) over a row; what f returns is stored where `write`.
template <bool write, typename F>
inline void each(float* row, int64_t columns, F f) {
  int64_t c = 0;
  for (; c + W <= columns; c += W) {
    vfloat v = f(c, load(row + c), W);
    if (write) store(row + c, v);
  }
  if (c == columns) return;
  vfloat v = f(c, load_part(row + c, columns - c), columns - c);
  if (write) store_part(row + c, v, columns - c);
}

// Lanes beyond the n in use become `filler`.
inline vfloat only(vfloat v, int64_t n, float filler) {
  if (n == W) return v;
  float lanes[W];
  store(lanes, v);
  for (int64_t i = n; i < W; i++) lanes[i] = filler;
  return load(lanes);
}

struct Map {
  float scale, softcap, inner;
  explicit Map(const LogitsBlock& b)
      : scale(b.scale), softcap(b.softcap), inner(b.softcap > 0 ? b.scale / b.softcap : 0.0f) {}
  vfloat operator()(vfloat l) const { return softcap > 0 ? capped(l) : l * scale; }
  // softcap * tanh u = +-(softcap - softcap * 2q / (1 + q)) with q = exp(-2|u|): the rounding error shrinks with q.
  vfloat capped(vfloat l) const {
    vfloat u = l * inner, q = vexp(-2.0f * vmax(u, -u));
    vfloat size = softcap - 2.0f * softcap * q / (1.0f + q);
    return select((vint)(u < splat(0.0f)), -size, size);
  }
};

float largest_of(float* row, int64_t columns, const Map& map, bool keep) {
  vfloat most = splat(-INFINITY);
  if (keep)
    each<true>(row, columns, [&](int64_t, vfloat l, int64_t n) {
      vfloat z = map(l);
      most = vmax(only(z, n, -INFINITY), most);
      return z;
    });
  else
    each<false>(row, columns, [&](int64_t, vfloat l, int64_t n) {
      most = vmax(only(map(l), n, -INFINITY), most);
      return l;
    });
  return largest(most);
}

// Three passes over a row, which stays in the second-level cache: the largest z, the exponentials in their place and
// their sum, the gradient.
float row_gradient(float* row, int64_t columns, int64_t label, const Map& map) {
  float most = largest_of(row, columns, map, false);
  float target = row[label] * map.scale;
  vfloat partial = {};
  each<true>(row, columns, [&](int64_t, vfloat l, int64_t n) {
    vfloat e = vexp(l * map.scale - most);
    partial += only(e, n, 0.0f);
    return e;
  });
  float total = sum(partial), per = map.scale / total;
  each<true>(row, columns, [&](int64_t, vfloat e, int64_t) { return e * per; });
  row[label] -= map.scale;
  return most + logf(total) - target;
}

// The same with a soft cap. Every pass starts from l again: dz/dl = scale * (1 - tanh^2) is 4 scale q / (1 + q)^2 with
// q = exp(-2 |scale l / softcap|), which keeps its digits where the cap saturates and 1 - tanh^2 has lost them.
float row_gradient_capped(float* row, int64_t columns, int64_t label, const Map& map) {
  float most = largest_of(row, columns, map, false);
  vfloat partial = {};
  each<false>(row, columns, [&](int64_t, vfloat l, int64_t n) {
    partial += only(vexp(map(l) - most), n, 0.0f);
    return l;
  });
  float total = sum(partial);
  auto slope = [&](vfloat l) {
    vfloat u = l * map.inner, q = vexp(-2.0f * vmax(u, -u)), below = 1.0f / (1.0f + q);
    return 4.0f * map.scale * q * below * below;
  };
  float own[W], at_label[W];
  store(own, map(splat(row[label])));
  store(at_label, slope(splat(row[label])));
  each<true>(row, columns, [&](int64_t, vfloat l, int64_t) { return vexp(map(l) - most) / total * slope(l); });
  row[label] -= at_label[0];
  return most + logf(total) - own[0];
}

}  // namespace

void loss_gradient(const LogitsBlock& b, float* losses) {
  Map map(b);
  parallel(b.rows, [&](int64_t r) {
    float* row = b.logits + r * b.stride;
    losses[r] = map.softcap > 0 ? row_gradient_capped(row, b.columns, b.labels[r], map)
                                : row_gradient(row, b.columns, b.labels[r], map);
  });
}

void loss_update(const LogitsBlock& b, const RowState& state) {
  Map map(b);
  parallel(b.rows, [&](int64_t r) {
    float* row = b.logits + r * b.stride;
    int64_t label = b.labels[r] - b.first;
    float most = largest_of(row, b.columns, map, true);
    if (label >= 0 && label < b.columns) state.target[r] = row[label];
    float before = state.most[r];
    if (before > most) most = before;
    vfloat partial = {};
    each<false>(row, b.columns, [&](int64_t, vfloat z, int64_t n) {
      partial += only(vexp(z - most), n, 0.0f);
      return z;
    });
    float kept = before == most ? state.total[r] : state.total[r] * expf(before - most);
    state.total[r] = kept + sum(partial);
    state.most[r] = most;
  });
}

void loss_best(const LogitsBlock& b, float* best, int64_t* columns) {
  parallel(b.rows, [&](int64_t r) {
    float* row = b.logits + r * b.stride;
    Map plain(LogitsBlock{nullptr, 0, 0, 0, 0, nullptr, b.scale, 0.0f});
    float most = largest_of(row, b.columns, plain, false);
    if (!(most > best[r])) return;
    best[r] = most;
    for (int64_t c = 0; c < b.columns; c++)
      if (row[c] * b.scale == most) {
        columns[r] = b.first + c;
        break;
      }
  });
}

}  // namespace tunegate::TUNEGATE_LEVEL
