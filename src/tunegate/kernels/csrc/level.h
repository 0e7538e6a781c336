// What one instruction-set level offers to the kernels: the vector type, conversions and a few functions of it.
//
// Every kernel file is compiled once per level, with that level's flags and TUNEGATE_LEVEL naming its namespace, so a
// kernel is written once, on GCC/Clang vector extensions. Nothing here or in a kernel file may come from a C++
// standard template: the linker would keep one copy for all levels, perhaps the one that this machine cannot run.
//
// Not here: intrinsics. The few kernels that need them (AMX, VNNI dot products) hold them themselves.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#ifndef TUNEGATE_LEVEL
#error "compile through CMakeLists.txt, which sets TUNEGATE_LEVEL and TUNEGATE_WIDTH for each level"
#endif

namespace tunegate::TUNEGATE_LEVEL {
namespace {

constexpr int W = TUNEGATE_WIDTH;  // fp32 lanes of a vector: 4, 8 or 16

typedef float vfloat __attribute__((vector_size(W * 4)));
typedef int32_t vint __attribute__((vector_size(W * 4)));
typedef uint32_t vuint __attribute__((vector_size(W * 4)));
typedef uint16_t vhalf __attribute__((vector_size(W * 2)));
struct bf16 {
  uint16_t bits;
};

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// Asks memory for what lies there, a line at a time; nothing is read.
constexpr int64_t LINE = 64;
inline void fetch(const void* from, const void* to) {
  for (const char* at = (const char*)from; at < (const char*)to; at += LINE) __builtin_prefetch(at);
}

inline vfloat splat(float x) { return x - vfloat{}; }  // x - 0 is x, -0 too, and costs nothing; 0 + x is an addition

inline vfloat load(const float* p) {
  vfloat v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vfloat v) { memcpy(p, &v, sizeof v); }

inline vfloat load(const bf16* p) {
  vhalf h;
  memcpy(&h, p, sizeof h);
  vuint wide = __builtin_convertvector(h, vuint) << 16;
  return (vfloat)wide;
}
// The bits of v as bf16. Round to nearest, ties to even; a NaN stays one (its payload is not kept).
inline vuint bf16_bits(vfloat v) {
  vuint u = (vuint)v;
  vuint rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  vint nan = (vint)(v != v);
  return (rounded & ~(vuint)nan) | ((vuint)nan & 0x7fc0);
}
inline void store(bf16* p, vfloat v) {
  vhalf h = __builtin_convertvector(bf16_bits(v), vhalf);
  memcpy(p, &h, sizeof h);
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline void set(float* p, float x) { *p = x; }
inline void set(bf16* p, float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  p->bits = x != x ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// The first n lanes from p, zeros after them, and back; n < W.
template <typename T>
inline vfloat load_part(const T* p, int64_t n) {
  float lanes[W] = {};
  for (int64_t i = 0; i < n; i++) lanes[i] = to_float(p[i]);
  return load(lanes);
}
template <typename T>
inline void store_part(T* p, vfloat v, int64_t n) {
  float lanes[W];
  store(lanes, v);
  for (int64_t i = 0; i < n; i++) set(p + i, lanes[i]);
}

inline vfloat select(vint mask, vfloat yes, vfloat no) {
  return (vfloat)((mask & (vint)yes) | (~mask & (vint)no));
}
inline vfloat vmax(vfloat a, vfloat b) { return select((vint)(a > b), a, b); }
inline vfloat vmin(vfloat a, vfloat b) { return select((vint)(a < b), a, b); }

inline float sum(vfloat v) {
  float lanes[W];
  store(lanes, v);
  for (int step = W / 2; step; step /= 2)
    for (int i = 0; i < step; i++) lanes[i] += lanes[i + step];
  return lanes[0];
}
inline float largest(vfloat v) {
  float lanes[W];
  store(lanes, v);
  for (int step = W / 2; step; step /= 2)
    for (int i = 0; i < step; i++) lanes[i] = lanes[i] > lanes[i + step] ? lanes[i] : lanes[i + step];
  return lanes[0];
}

// Four lanes: what transposes and columns of four are made of, at every level.
typedef float quad __attribute__((vector_size(16)));
typedef uint32_t quad_bits __attribute__((vector_size(16)));
typedef uint16_t quad_half __attribute__((vector_size(8)));

inline quad load4(const float* p) {
  quad v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline quad load4(const bf16* p) {
  quad_half h;
  memcpy(&h, p, sizeof h);
  return (quad)(__builtin_convertvector(h, quad_bits) << 16);
}
inline void store4(float* p, quad v) { memcpy(p, &v, sizeof v); }
inline void store4(bf16* p, quad v) {
  for (int i = 0; i < 4; i++) set(p + i, v[i]);
}
inline void transpose4(quad& a, quad& b, quad& c, quad& d) {
  quad low_ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), low_cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  quad high_ab = __builtin_shufflevector(a, b, 2, 6, 3, 7), high_cd = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  a = __builtin_shufflevector(low_ab, low_cd, 0, 1, 4, 5);
  b = __builtin_shufflevector(low_ab, low_cd, 2, 3, 6, 7);
  c = __builtin_shufflevector(high_ab, high_cd, 0, 1, 4, 5);
  d = __builtin_shufflevector(high_ab, high_cd, 2, 3, 6, 7);
}

// W / 4 quads as one vector, and the transposes of four vectors' quads, each apart.
#if TUNEGATE_WIDTH == 4
inline vfloat join(const quad* parts) { return parts[0]; }
#else
#if TUNEGATE_WIDTH == 8
#define TUNEGATE_QUADS(a, b, i, j, k, l) \
  __builtin_shufflevector(a, b, i, j, k, l, i + 4, j + 4, k + 4, l + 4)
inline vfloat join(const quad* parts) { return __builtin_shufflevector(parts[0], parts[1], 0, 1, 2, 3, 4, 5, 6, 7); }
#else
#define TUNEGATE_QUADS(a, b, i, j, k, l)                                                                           \
  __builtin_shufflevector(a, b, i, j, k, l, i + 4, j + 4, k + 4, l + 4, i + 8, j + 8, k + 8, l + 8, i + 12, j + 12, \
                          k + 12, l + 12)
inline vfloat join(const quad* parts) {
  typedef float eight __attribute__((vector_size(32)));
  eight low = __builtin_shufflevector(parts[0], parts[1], 0, 1, 2, 3, 4, 5, 6, 7);
  eight high = __builtin_shufflevector(parts[2], parts[3], 0, 1, 2, 3, 4, 5, 6, 7);
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
#endif
inline void transpose4(vfloat& a, vfloat& b, vfloat& c, vfloat& d) {
  vfloat low_ab = TUNEGATE_QUADS(a, b, 0, W, 1, W + 1), low_cd = TUNEGATE_QUADS(c, d, 0, W, 1, W + 1);
  vfloat high_ab = TUNEGATE_QUADS(a, b, 2, W + 2, 3, W + 3), high_cd = TUNEGATE_QUADS(c, d, 2, W + 2, 3, W + 3);
  a = TUNEGATE_QUADS(low_ab, low_cd, 0, 1, W, W + 1), b = TUNEGATE_QUADS(low_ab, low_cd, 2, 3, W + 2, W + 3);
  c = TUNEGATE_QUADS(high_ab, high_cd, 0, 1, W, W + 1), d = TUNEGATE_QUADS(high_ab, high_cd, 2, 3, W + 2, W + 3);
}
#undef TUNEGATE_QUADS
#endif

// e^x = p 2^n for x in [-87.4, 88.8]: p in [0.7, 1.5] is returned.
// Range reduction x = n ln2 + r with a two-part ln2 (Cody & Waite), then the minimax polynomial of degree 6 on
// |r| <= ln2 / 2, its own error 4e-9.
inline vfloat exp_parts(vfloat x, vint* exponent) {
  vfloat shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to the nearest integer
  vint n = (vint)shifted - 0x4b400000;
  vfloat whole = shifted - 12582912.0f;
  vfloat r = x - whole * 0.693145751953125f;
  r = r - whole * 1.428606765330187e-06f;
  vfloat p = splat(1.3814598788e-3f);
  p = p * r + 8.3687165752e-3f;
  p = p * r + 4.1668388993e-2f;
  p = p * r + 1.6666521132e-01f;
  p = p * r + 4.9999994040e-01f;
  p = p * r * r + r + 1.0f;
  *exponent = n;
  return p;
}

// e^x, relative error below 1.2e-7 (2 ulp) on [-87.3, 88.7]; 0 below that and +inf above. NaN gives NaN.
inline vfloat vexp(vfloat x) {
  const vfloat low = splat(-87.33654f), high = splat(88.72283f);
  vfloat kept = vmin(vmax(x, low), high);
  vint n;
  vfloat p = exp_parts(kept, &n);
  vint half = n >> 1;  // two factors, so that 2^128 does not overflow on the way
  vfloat result = p * (vfloat)((half + 127) << 23) * (vfloat)((n - half + 127) << 23);
  result = select((vint)(x < low), splat(0.0f), result);
  result = select((vint)(x > high), splat(INFINITY), result);
  return select((vint)(x != x), x, result);
}
inline vfloat vsigmoid(vfloat x) { return 1.0f / (1.0f + vexp(-x)); }
// tanh, absolute error below 2e-7.
inline vfloat vtanh(vfloat x) { return 1.0f - 2.0f / (vexp(2.0f * x) + 1.0f); }

}  // namespace
}  // namespace tunegate::TUNEGATE_LEVEL
