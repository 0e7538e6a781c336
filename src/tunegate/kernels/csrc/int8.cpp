#include "int8.h"

#include "gemm_weights.h"
#include "level.h"
#include "pool.h"

namespace tunegate::TUNEGATE_LEVEL {
namespace {

constexpr int64_t kTask = 16384;  // elements

// Through memory: a product rounded by itself, where the compiler would contract it into a multiply-add.
inline vfloat rounded(vfloat v) {
  asm("" : "+m"(v));
  return v;
}

// The largest magnitude. Magnitudes compare as integers, and a NaN compares above all of them.
template <typename T>
inline float largest_of(const T* x, int64_t n) {
  vint most = {};
  int64_t i = 0;
  auto look = [&](vfloat v) {
    vint bits = (vint)v & 0x7fffffff, more = (vint)(bits > most);
    most = (bits & more) | (most & ~more);
  };
  for (; i + W <= n; i += W) look(load(x + i));
  if (i < n) look(load_part(x + i, n - i));
  int32_t lanes[W], found = 0;
  memcpy(lanes, &most, sizeof lanes);
  for (int lane = 0; lane < W; lane++) found = lanes[lane] > found ? lanes[lane] : found;
  float result;
  memcpy(&result, &found, 4);
  return result;
}

// Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.
inline void codes_of(vfloat v, float factor, int64_t n, int8_t* to) {
  vint code = (vint)(rounded(v * factor) + 12582912.0f) - 0x4b400000;
  int32_t lanes[W];
  memcpy(lanes, &code, sizeof lanes);
  for (int64_t i = 0; i < n; i++) to[i] = int8_t(lanes[i]);
}

template <typename T>
inline void quantize_row(const T* x, int64_t n, int8_t* codes, float* absmax) {
  *absmax = largest_of(x, n);
  float factor = 1.0f / *absmax * 127.0f;  // as torch divides a number by a tensor: rounded twice
  if (!(factor <= 3.402823466e38f)) {  // a row of zeros, or of numbers whose reciprocal is none: bitsandbytes' codes too
    if (n > 0) memset(codes, 0, size_t(n));  // codes of no elements may be a null pointer
    return;
  }
  int64_t i = 0;
  for (; i + W <= n; i += W) codes_of(load(x + i), factor, W, codes + i);
  if (i < n) codes_of(load_part(x + i, n - i), factor, n - i, codes + i);
}

// Some rows at a time: body(row).
template <typename F>
inline void over_rows(int64_t rows, int64_t columns, F&& body) {
  int64_t each = max_of(1, kTask / max_of(1, columns));
  parallel((rows + each - 1) / each, [&](int64_t task) {
    for (int64_t row = task * each; row < min_of(rows, (task + 1) * each); row++) body(row);
  });
}

template <typename T>
void quantize(const T* x, int64_t rows, int64_t columns, int8_t* codes, float* absmax) {
  over_rows(rows, columns,
            [&](int64_t row) { quantize_row(x + row * columns, columns, codes + row * columns, absmax + row); });
}

template <typename T>
void dequantize(const int8_t* codes, const float* absmax, int64_t rows, int64_t columns, T* out) {
  over_rows(rows, columns,
            [&](int64_t row) { decode_bytes(codes + row * columns, columns, absmax[row], out + row * columns); });
}

}  // namespace

void int8_quantize(const void* x, bool wide, int64_t rows, int64_t columns, int8_t* codes, float* absmax) {
  if (wide) return quantize((const float*)x, rows, columns, codes, absmax);
  quantize((const bf16*)x, rows, columns, codes, absmax);
}

void int8_dequantize(const int8_t* codes, const float* absmax, int64_t rows, int64_t columns, void* out, bool wide) {
  if (wide) return dequantize(codes, absmax, rows, columns, (float*)out);
  dequantize(codes, absmax, rows, columns, (bf16*)out);
}

}  // namespace tunegate::TUNEGATE_LEVEL
