// A task takes some rows, a row is swept in vectors, and the last, shorter vector goes through the same body.
#include "elementwise.h"

#include "level.h"
#include "pool.h"

namespace tunegate::TUNEGATE_LEVEL {
namespace {

constexpr int64_t kGrain = 16384;  // elements of a task: some microseconds of work

template <typename T>
inline T* row_of(const StridedRows& rows, int64_t r) {
  return static_cast<T*>(rows.data) + r * rows.stride;
}

// A whole vector and the last part of a row, behind one interface.
struct Whole {
  template <typename T>
  vfloat get(const T* p) const {
    return load(p);
  }
  template <typename T>
  void put(T* p, vfloat v) const {
    store(p, v);
  }
};
struct Part {
  int64_t lanes;
  template <typename T>
  vfloat get(const T* p) const {
    return load_part(p, lanes);
  }
  template <typename T>
  void put(T* p, vfloat v) const {
    store_part(p, v, lanes);
  }
};

template <typename F>
inline void sweep(int64_t count, F&& body) {
  int64_t i = 0;
  for (; i + W <= count; i += W) body(i, Whole{});
  if (i < count) body(i, Part{count - i});
}

// The sum of term(i, lanes) over a row, in four chains, because one would wait for each addition.
template <typename F>
inline float total(int64_t count, F&& term) {
  vfloat a{}, b{}, c{}, d{};
  int64_t i = 0;
  for (; i + 4 * W <= count; i += 4 * W) {
    a += term(i, Whole{});
    b += term(i + W, Whole{});
    c += term(i + 2 * W, Whole{});
    d += term(i + 3 * W, Whole{});
  }
  for (; i + W <= count; i += W) a += term(i, Whole{});
  if (i < count) b += term(i, Part{count - i});
  return sum((a + b) + (c + d));
}

template <typename F>
inline void for_rows(int64_t rows, int64_t columns, F&& body) {
  int64_t block = max_of(1, kGrain / max_of(1, columns));
  parallel((rows + block - 1) / block, [&](int64_t task) {
    int64_t end = min_of(rows, (task + 1) * block);
    for (int64_t r = task * block; r < end; r++) body(r);
  });
}

// ---- RMS norm

// weight + offset in fp32, in the caller's scratch: one conversion for all rows.
const float* effective_weight(const NormCall& call) {
  int64_t columns = call.shape.columns;
  float* out = static_cast<float*>(scratch(max_of(1, columns) * 4, 0));
  for (int64_t i = 0; i < columns; i++) {
    float w = call.weight_is_bf16 ? to_float(static_cast<const bf16*>(call.weight)[i])
                                  : static_cast<const float*>(call.weight)[i];
    out[i] = w + call.offset;
  }
  return out;
}

template <typename T>
void norm_rows(const NormCall& call, const float* weight) {
  int64_t columns = call.shape.columns;
  for_rows(call.shape.rows, columns, [&](int64_t r) {
    const T* x = row_of<T>(call.x, r);
    T* out = row_of<T>(call.out, r);
    float squares = total(columns, [&](int64_t i, auto lanes) {
      vfloat v = lanes.get(x + i);
      return v * v;
    });
    float inverse = 1.0f / __builtin_sqrtf(squares / float(columns) + call.eps);
    call.inverse_rms[r] = inverse;
    sweep(columns, [&](int64_t i, auto lanes) {
      lanes.put(out + i, lanes.get(x + i) * inverse * lanes.get(weight + i));
    });
  });
}

// With n = x s, s the inverse rms, and g = grad_out * weight: dx = s (g - n mean(g n)).
template <typename T>
void norm_backward_rows(const NormCall& call, const float* weight) {
  int64_t columns = call.shape.columns;
  for_rows(call.shape.rows, columns, [&](int64_t r) {
    const T *x = row_of<T>(call.x, r), *grad = row_of<T>(call.grad_out, r);
    const T* add = call.add.data ? row_of<T>(call.add, r) : nullptr;
    T* out = row_of<T>(call.out, r);
    float s = call.inverse_rms[r];
    float dot = total(columns, [&](int64_t i, auto lanes) {
      return lanes.get(grad + i) * lanes.get(weight + i) * (lanes.get(x + i) * s);
    });
    float mean = dot / float(columns) * s;
    auto gradient = [&](int64_t i, auto lanes) {
      return (lanes.get(grad + i) * lanes.get(weight + i) - lanes.get(x + i) * mean) * s;
    };
    if (add)
      sweep(columns, [&](int64_t i, auto lanes) { lanes.put(out + i, lanes.get(add + i) + gradient(i, lanes)); });
    else
      sweep(columns, [&](int64_t i, auto lanes) { lanes.put(out + i, gradient(i, lanes)); });
  });
}

// ---- rotary positions

template <typename T, typename A>
void rotate(const RopeCall& call) {
  int64_t half = call.rotated / 2;
  // Forward is the matrix [[c1, -s1], [s2, c2]] on the pair (x1, x2), inverse its transpose.
  for_rows(call.tokens, call.heads * call.rotated, [&](int64_t t) {
    const A *c = row_of<A>(call.cosine, t), *s = row_of<A>(call.sine, t);
    T* token = static_cast<T*>(call.x) + t * call.token_stride;
    for (int64_t h = 0; h < call.heads; h++) {
      T* x = token + h * call.head_stride;
      auto turn = [&](int64_t i, auto lanes) {
        vfloat x1 = lanes.get(x + i), x2 = lanes.get(x + half + i);
        vfloat c1 = lanes.get(c + i), c2 = lanes.get(c + half + i);
        vfloat s1 = lanes.get(s + i), s2 = lanes.get(s + half + i);
        vfloat up = call.inverse ? s2 : -s1, down = call.inverse ? -s1 : s2;
        lanes.put(x + i, x1 * c1 + x2 * up);
        lanes.put(x + half + i, x2 * c2 + x1 * down);
      };
      sweep(half, turn);
    }
  });
}

// ---- DoRA's gain per column, backward

template <typename T>
void gain_rows(const GainCall& call) {
  int64_t rows = call.shape.rows, columns = call.shape.columns;
  int64_t chunks = (rows + gain_chunk - 1) / gain_chunk;
  parallel(chunks, [&](int64_t chunk) {
    float* part = call.partial + chunk * columns;
    memset(part, 0, columns * sizeof(float));
    for (int64_t row = chunk * gain_chunk; row < min_of(rows, (chunk + 1) * gain_chunk); row++) {
      const T* grad = (const T*)call.grad.data + row * call.grad.stride;
      const T* out = (const T*)call.out.data + row * call.out.stride;
      T* scaled = (T*)call.scaled.data + row * call.scaled.stride;
      sweep(columns, [&](int64_t i, auto lanes) {
        vfloat g = lanes.get(grad + i) * call.factor, y = lanes.get(out + i);
        if (call.bias) y -= lanes.get(call.bias + i);
        lanes.put(part + i, lanes.get(part + i) + g * y);
        lanes.put(scaled + i, g * lanes.get(call.gain + i));
      });
    }
  });
  memset(call.sums, 0, columns * sizeof(float));
  for (int64_t chunk = 0; chunk < chunks; chunk++)
    sweep(columns, [&](int64_t i, auto lanes) {
      lanes.put(call.sums + i, lanes.get(call.sums + i) + lanes.get(call.partial + chunk * columns + i));
    });
}

// ---- gated activations

struct Activated {
  vfloat value, slope;
};

inline Activated silu(vfloat x) {
  vfloat s = vsigmoid(x);
  return {x * s, s * (1.0f + x * (1.0f - s))};
}

// 0.5 (1 + tanh u) is sigmoid(2 u), which keeps its relative precision for negative x. Beyond 20 it is 0 or 1, and the
// clamp keeps the cube finite; in this order of arguments it lets a NaN through.
inline Activated gelu_tanh(vfloat x) {
  vfloat kept = vmin(splat(20.0f), vmax(splat(-20.0f), x));
  vfloat square = kept * kept;
  vfloat twice = kept * (1.5957691216f + 0.0713548162726f * square);
  vfloat s = vsigmoid(twice);
  vfloat twice_slope = 1.5957691216f + 0.2140644488178f * square;
  return {x * s, s + kept * s * (1.0f - s) * twice_slope};
}

// The normal distribution's tail P(-a) = exp(-a^2 / 2) S(a) for a >= 0: S is Mills' ratio over sqrt(2 pi), smooth, and
// here t Q(t) with t = 1 / (1 + 0.36 a) and Q a minimax polynomial, relative error below 4e-7 in fp32.
inline Activated gelu(vfloat x) {
  vfloat kept = vmin(splat(14.0f), vmax(splat(-14.0f), x));
  vfloat a = vmax(kept, -kept);
  vfloat bell = vexp(-0.5f * (a * a));
  vfloat t = 1.0f / (1.0f + 0.36f * a);
  vfloat q = splat(0.0110663408f);
  q = q * t - 0.0870366916f;
  q = q * t + 0.264399916f;
  q = q * t - 0.377393514f;
  q = q * t + 0.22373566f;
  q = q * t - 0.0562264211f;
  q = q * t + 0.112950779f;
  q = q * t + 0.120905042f;
  q = q * t + 0.143994331f;
  q = q * t + 0.143604547f;
  vfloat tail = bell * q * t;
  vfloat below = select((vint)(kept < 0.0f), tail, 1.0f - tail);
  return {x * below, below + kept * bell * 0.3989422804f};
}

template <Activation A>
inline Activated activate(vfloat x) {
  if constexpr (A == Activation::silu) return silu(x);
  if constexpr (A == Activation::gelu_tanh) return gelu_tanh(x);
  return gelu(x);
}

template <typename T, Activation A>
void gate_rows(const GluCall& call) {
  for_rows(call.shape.rows, call.shape.columns, [&](int64_t r) {
    const T *gate = row_of<T>(call.gate, r), *up = row_of<T>(call.up, r);
    T* out = row_of<T>(call.out, r);
    sweep(call.shape.columns, [&](int64_t i, auto lanes) {
      lanes.put(out + i, activate<A>(lanes.get(gate + i)).value * lanes.get(up + i));
    });
  });
}

template <typename T, Activation A>
void gate_backward_rows(const GluCall& call) {
  for_rows(call.shape.rows, call.shape.columns, [&](int64_t r) {
    const T *gate = row_of<T>(call.gate, r), *up = row_of<T>(call.up, r), *grad = row_of<T>(call.grad_out, r);
    T *grad_gate = row_of<T>(call.grad_gate, r), *grad_up = row_of<T>(call.grad_up, r);
    sweep(call.shape.columns, [&](int64_t i, auto lanes) {
      vfloat g = lanes.get(grad + i), u = lanes.get(up + i);
      Activated act = activate<A>(lanes.get(gate + i));
      lanes.put(grad_gate + i, g * u * act.slope);
      lanes.put(grad_up + i, g * act.value);
    });
  });
}

template <typename T>
void gate_any(const GluCall& call) {
  if (call.activation == Activation::silu) return gate_rows<T, Activation::silu>(call);
  if (call.activation == Activation::gelu_tanh) return gate_rows<T, Activation::gelu_tanh>(call);
  gate_rows<T, Activation::gelu>(call);
}
template <typename T>
void gate_any_backward(const GluCall& call) {
  if (call.activation == Activation::silu) return gate_backward_rows<T, Activation::silu>(call);
  if (call.activation == Activation::gelu_tanh) return gate_backward_rows<T, Activation::gelu_tanh>(call);
  gate_backward_rows<T, Activation::gelu>(call);
}

// ---- dropout

// The finalizer of SplitMix64 (Steele, Lea & Flood 2014) for rows, and for columns a 32-bit multiply-xorshift with
// the constants of Wellons' "lowbias32". Two keys a row: with one, two rows could share a shifted mask.
inline uint64_t mixed(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}
inline uint64_t row_key(uint64_t seed, uint64_t row) {
  constexpr uint64_t golden = 0x9E3779B97F4A7C15u;
  return mixed(mixed(seed + golden) + (row + 1) * golden);
}
inline vuint column_hash(vuint pair, uint32_t first_key, uint32_t second_key) {
  vuint h = pair + first_key;
  h = (h ^ (h >> 16)) * 0x7FEB352Du;
  h ^= second_key;
  h = (h ^ (h >> 15)) * 0x846CA68Bu;
  return h ^ (h >> 16);
}

inline vuint counting() {
  uint32_t lanes[W];
  for (int i = 0; i < W; i++) lanes[i] = uint32_t(i);
  vuint v;
  memcpy(&v, lanes, sizeof v);
  return v;
}

// W hashes hold the 16-bit draws of 2 W columns; in memory order the low half of a hash is the even column.
template <typename T, bool adds>
void drop_rows(const DropoutCall& call) {
  int64_t columns = call.shape.columns;
  vuint first_pairs = counting();
  for_rows(call.shape.rows, columns, [&](int64_t r) {
    uint64_t key = row_key(call.seed, uint64_t(r + call.row_offset));
    const T* x = row_of<T>(call.x, r);
    T* out = row_of<T>(call.out, r);
    for (int64_t start = 0; start < columns; start += 2 * W) {
      vuint hash = column_hash(first_pairs + uint32_t(start / 2), uint32_t(key), uint32_t(key >> 32));
      vhalf halves[2];
      memcpy(halves, &hash, sizeof halves);
      for (int k = 0; k < 2; k++) {
        int64_t at = start + k * W;
        vint kept = (vint)(__builtin_convertvector(halves[k], vuint) >= call.threshold);
        auto apply = [&](auto lanes) {
          vfloat v = select(kept, lanes.get(x + at) * call.scale, splat(0.0f));
          if constexpr (adds) v += lanes.get(out + at);
          lanes.put(out + at, v);
        };
        if (at + W <= columns)
          apply(Whole{});
        else if (at < columns)
          apply(Part{columns - at});
      }
    }
  });
}

}  // namespace

void rms_norm(const NormCall& call) {
  const float* weight = effective_weight(call);
  call.shape.is_bf16 ? norm_rows<bf16>(call, weight) : norm_rows<float>(call, weight);
}

void rms_norm_backward(const NormCall& call) {
  const float* weight = effective_weight(call);
  call.shape.is_bf16 ? norm_backward_rows<bf16>(call, weight) : norm_backward_rows<float>(call, weight);
}

void rope(const RopeCall& call) {
  if (call.is_bf16)
    call.angles_are_bf16 ? rotate<bf16, bf16>(call) : rotate<bf16, float>(call);
  else
    call.angles_are_bf16 ? rotate<float, bf16>(call) : rotate<float, float>(call);
}

void gated(const GluCall& call) { call.shape.is_bf16 ? gate_any<bf16>(call) : gate_any<float>(call); }

void gated_backward(const GluCall& call) {
  call.shape.is_bf16 ? gate_any_backward<bf16>(call) : gate_any_backward<float>(call);
}

void gain_backward(const GainCall& call) {
  call.shape.is_bf16 ? gain_rows<bf16>(call) : gain_rows<float>(call);
}

void dropout(const DropoutCall& call) {
  if (call.shape.is_bf16)
    call.adds ? drop_rows<bf16, true>(call) : drop_rows<bf16, false>(call);
  else
    call.adds ? drop_rows<float, true>(call) : drop_rows<float, false>(call);
}

// For tests of level.h: 0 exp, 1 sigmoid, 2 tanh.
void vector_function(int which, const float* x, float* out, int64_t count) {
  sweep(count, [&](int64_t i, auto lanes) {
    vfloat v = lanes.get(x + i);
    lanes.put(out + i, which == 0 ? vexp(v) : which == 1 ? vsigmoid(v) : vtanh(v));
  });
}

}  // namespace tunegate::TUNEGATE_LEVEL
