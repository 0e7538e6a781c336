// Two passes: all low-rank activations, then all outputs. A block of rows streams its adapter's factors once, and only
// those. A row's sums are the same bytes whatever else is in the batch, and no sum is split between threads.
#include "segments.h"

#include "gemm.h"
#include "level.h"
#include "pool.h"

namespace tunegate::TUNEGATE_LEVEL {
namespace {

constexpr int64_t kRows = 16;         // of a segment that a task takes
constexpr int64_t kDowns = 4;         // rows of A that it multiplies with
constexpr int64_t kColumns = 16 * W;  // of the output that it adds to

struct Block {  // some rows of a segment, and one projection
  int64_t begin, end;
  int target;
  const Factors* factors;
};

inline const Segment* segments_of(const SegmentsCall& c) { return (const Segment*)(c.segments + 1); }

inline float* low_rank(const SegmentsCall& c, int target, int64_t row) {
  return c.work + (target * c.rows + row) * c.most_rank;
}

// sums[j][r] += a[j] . x[r] over k, a multiple of W, for four rows of A and ROWS of x.
template <int ROWS, typename T>
inline void dots(const T* const* a, const float* x, int64_t x_stride, int64_t k, vfloat (*sums)[kRows]) {
  vfloat acc[kDowns][ROWS] = {};
  for (int64_t i = 0; i < k; i += W)
    for (int j = 0; j < kDowns; j++) {
      vfloat values = load(a[j] + i);
      for (int r = 0; r < ROWS; r++) acc[j][r] += values * load(x + r * x_stride + i);
    }
  for (int j = 0; j < kDowns; j++)
    for (int r = 0; r < ROWS; r++) sums[j][r] = acc[j][r];
}

// work[row][r] = scale * x[row] . a[r] for some r.
template <typename T>
inline void downs(const SegmentsCall& c, const Block& b, int64_t r0, const float* x, int64_t x_stride) {
  const Factors& f = *b.factors;
  int64_t rows = b.end - b.begin, some = min_of(kDowns, f.rank - r0), whole = c.k / W * W, r = 0;
  const T* a[kDowns];
  for (int64_t j = 0; j < kDowns; j++) a[j] = (const T*)f.a + (r0 + min_of(j, some - 1)) * c.k;
  vfloat sums[kDowns][kRows];
  for (; r + 3 <= rows; r += 3) dots<3>(a, x + r * x_stride, x_stride, whole, (vfloat(*)[kRows])(&sums[0][r]));
  if (rows - r == 2) dots<2>(a, x + r * x_stride, x_stride, whole, (vfloat(*)[kRows])(&sums[0][r]));
  if (rows - r == 1) dots<1>(a, x + r * x_stride, x_stride, whole, (vfloat(*)[kRows])(&sums[0][r]));
  for (int64_t row = 0; row < rows; row++) {
    float* to = low_rank(c, b.target, b.begin + row) + r0;
    for (int64_t j = 0; j < some; j++) {
      float total = sum(sums[j][row]);
      for (int64_t k = whole; k < c.k; k++) total += x[row * x_stride + k] * to_float(a[j][k]);
      to[j] = total * float(f.scale);
    }
  }
}

inline vfloat part(const void* p, int32_t type, int64_t at, int64_t n) {
  if (type == kBf16) return n == W ? load((const bf16*)p + at) : load_part((const bf16*)p + at, n);
  return n == W ? load((const float*)p + at) : load_part((const float*)p + at, n);
}

inline void put(void* p, int32_t type, int64_t at, vfloat v, int64_t n) {
  if (type == kBf16)
    n == W ? store((bf16*)p + at, v) : store_part((bf16*)p + at, v, n);
  else
    n == W ? store((float*)p + at, v) : store_part((float*)p + at, v, n);
}

inline void finish(const SegmentsCall& c, const Block& b, int64_t row, int64_t j, vfloat low, int64_t n) {
  const SegmentTarget& t = c.target[b.target];
  vfloat out = part(t.out, c.type, row * t.stride + j, n);
  if (b.factors->gain) {
    vfloat bias = t.bias ? part(t.bias, t.bias_type, j, n) : vfloat{};
    out = (out - bias + low) * part(b.factors->gain, kFp32, j, n) + bias;
  } else {
    out = out + low;
  }
  put(t.out, c.type, row * t.stride + j, out, n);
}

// V vectors of columns from j on, of which the last may be cut at n: eight sums hide their latency.
template <int ROWS, int V, typename T>
inline void some_ups(const SegmentsCall& c, const Block& b, int64_t row, int64_t j, int64_t n) {
  int64_t columns = c.target[b.target].n, rank = b.factors->rank;
  const T* up = (const T*)b.factors->b + j;
  const float* low[ROWS];
  for (int i = 0; i < ROWS; i++) low[i] = low_rank(c, b.target, row + i);
  vfloat sums[ROWS][V] = {};
  for (int64_t r = 0; r < rank; r++, up += columns) {
    vfloat values[V];
    for (int v = 0; v < V; v++) values[v] = n == V * W ? load(up + v * W) : load_part(up, n);
    for (int i = 0; i < ROWS; i++)
      for (int v = 0; v < V; v++) sums[i][v] += splat(low[i][r]) * values[v];
  }
  for (int i = 0; i < ROWS; i++)
    for (int v = 0; v < V; v++) finish(c, b, row + i, j + v * W, sums[i][v], n == V * W ? W : n);
}

template <int ROWS, typename T>
inline void rows_ups(const SegmentsCall& c, const Block& b, int64_t row, int64_t j, int64_t end) {
  constexpr int V = 8 / ROWS;
  for (; j + V * W <= end; j += V * W) some_ups<ROWS, V, T>(c, b, row, j, V * W);
  for (; j < end; j += W) some_ups<ROWS, 1, T>(c, b, row, j, min_of(W, end - j));
}

// Columns j0 .. of the block's outputs.
template <typename T>
inline void ups(const SegmentsCall& c, const Block& b, int64_t j0) {
  int64_t columns = c.target[b.target].n, end = min_of(j0 + kColumns, columns), row = b.begin;
  const T* up = (const T*)b.factors->b;
  for (int64_t r = 0; r < b.factors->rank; r++) fetch(up + r * columns + j0, up + r * columns + end);
  for (; row + 4 <= b.end; row += 4) rows_ups<4, T>(c, b, row, j0, end);
  for (; row + 2 <= b.end; row += 2) rows_ups<2, T>(c, b, row, j0, end);
  for (; row < b.end; row++) rows_ups<1, T>(c, b, row, j0, end);
}

// Tasks of all blocks: size(block) of them each.
template <typename S, typename F>
inline void over_blocks(const Block* blocks, int64_t* starts, int64_t count, S&& size,
                        F&& body) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; i++) starts[i] = total, total += size(blocks[i]);
  parallel(total, [&](int64_t index) {
    int64_t low = 0, high = count;  // the last block that starts at or before index
    while (high - low > 1) {
      int64_t middle = (low + high) / 2;
      (starts[middle] <= index ? low : high) = middle;
    }
    body(blocks[low], index - starts[low]);
  });
}

// Some values from any address into line, which is aligned; their largest magnitude's bits come into most.
inline void take(float* line, const char* from, int64_t n, vint* most) {
  memcpy(line, from, size_t(n) * 4);
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    vint bits = (vint)load(line + i) & 0x7fffffff;
    *most = bits > *most ? bits : *most;
  }
  if (i < n) {
    vint bits = (vint)load_part(line + i, n - i) & 0x7fffffff;
    *most = bits > *most ? bits : *most;
  }
}

template <typename T>
inline void put_line(T* to, const float* line, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(line + i));
  if (i < n) store_part(to + i, load_part(line + i, n - i), n - i);
}

constexpr int64_t kLine = 1024;  // values that are moved at a time

template <typename T>
inline void lay_straight(const LayOut& p, vint* most) {
  float line[kLine];
  for (int64_t at = 0, all = p.rows * p.columns; at < all; at += kLine) {
    int64_t n = min_of(kLine, all - at);
    take(line, (const char*)p.from + at * 4, n, most);
    put_line((T*)p.to + at, line, n);
  }
}

// turned (columns, rows) = line (rows, columns) transposed.
inline void turn(const float* line, int64_t rows, int64_t columns, float* turned) {
  int64_t c = 0;
  for (; c + 4 <= columns; c += 4) {
    const float* from = line + c;
    float* to = turned + c * rows;
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4, from += 4 * columns) {
      quad q[4] = {load4(from), load4(from + columns), load4(from + 2 * columns), load4(from + 3 * columns)};
      transpose4(q[0], q[1], q[2], q[3]);
      for (int i = 0; i < 4; i++) store4(to + i * rows + r, q[i]);
    }
    for (; r < rows; r++, from += columns)
      for (int i = 0; i < 4; i++) to[i * rows + r] = from[i];
  }
  for (; c < columns; c++)
    for (int64_t r = 0; r < rows; r++) turned[c * rows + r] = line[r * columns + c];
}

// Blocks of a line's values, so that what goes to a row is of some length.
template <typename T>
inline void lay_across(const LayOut& p, vint* most) {
  float line[kLine], turned[kLine];
  int64_t width = max_of(1, min_of(p.columns, kLine / 16)), height = kLine / width;
  for (int64_t c0 = 0; c0 < p.columns; c0 += width)
    for (int64_t r0 = 0; r0 < p.rows; r0 += height) {
      int64_t columns = min_of(width, p.columns - c0), rows = min_of(height, p.rows - r0);
      int64_t run = columns == p.columns ? rows * columns : columns;
      for (int64_t at = 0; at < rows * columns; at += run)
        take(line + at, (const char*)p.from + ((r0 + at / columns) * p.columns + c0) * 4, run, most);
      turn(line, rows, columns, turned);
      for (int64_t c = 0; c < columns; c++) put_line((T*)p.to + (c0 + c) * p.rows + r0, turned + c * rows, rows);
    }
}

}  // namespace

void lay_out(const LayOut* parts, int64_t count, int32_t type, uint32_t* largest) {
  vint most[2] = {};
  for (int64_t i = 0; i < count; i++) {
    const LayOut& p = parts[i];
    vint* own = &most[p.transposed ? 1 : 0];
    if (type == kBf16)
      p.transposed ? lay_across<bf16>(p, own) : lay_straight<bf16>(p, own);
    else
      p.transposed ? lay_across<float>(p, own) : lay_straight<float>(p, own);
  }
  for (int kind = 0; kind < 2; kind++) {
    largest[kind] = 0;
    for (int i = 0; i < W; i++)
      if (uint32_t(most[kind][i]) > largest[kind]) largest[kind] = uint32_t(most[kind][i]);
  }
}

void add_segments(const SegmentsCall& call) {
  const SegmentsCall& c = call;
  const Segment* segments = segments_of(c);
  int64_t most = 0;
  for (int64_t i = 0; i < c.segments[0]; i++) most += (segments[i].end - segments[i].begin + kRows - 1) / kRows;
  if (!most) return;
  most *= c.targets;
  Block* blocks = (Block*)scratch(most * int64_t(sizeof(Block) + 8), 2);
  int64_t* starts = (int64_t*)(blocks + most);
  int64_t count = 0;
  for (int64_t i = 0; i < c.segments[0]; i++)
    for (int t = 0; t < c.targets; t++) {
      const Factors* f = c.table + segments[i].slot * c.columns + c.target[t].column;
      for (int64_t row = segments[i].begin; f->rank && row < segments[i].end; row += kRows)
        blocks[count++] = {row, min_of(row + kRows, segments[i].end), t, f};
    }
  const float* x = (const float*)c.x;
  int64_t stride = c.x_stride;
  if (c.type == kBf16) {
    float* wide = c.work + c.targets * c.rows * c.most_rank;
    parallel(c.rows, [&](int64_t row) {
      const bf16* from = (const bf16*)c.x + row * c.x_stride;
      int64_t k = 0;
      for (; k + W <= c.k; k += W) store(wide + row * c.k + k, load(from + k));
      for (; k < c.k; k++) wide[row * c.k + k] = to_float(from[k]);
    });
    x = wide, stride = c.k;
  }
  over_blocks(
      blocks, starts, count, [](const Block& b) { return (b.factors->rank + kDowns - 1) / kDowns; },
      [&](const Block& b, int64_t index) {
        if (c.factor_type == kBf16)
          downs<bf16>(c, b, index * kDowns, x + b.begin * stride, stride);
        else
          downs<float>(c, b, index * kDowns, x + b.begin * stride, stride);
      });
  over_blocks(
      blocks, starts, count, [&](const Block& b) { return (c.target[b.target].n + kColumns - 1) / kColumns; },
      [&](const Block& b, int64_t index) {
        if (c.factor_type == kBf16)
          ups<bf16>(c, b, index * kColumns);
        else
          ups<float>(c, b, index * kColumns);
      });
}

}  // namespace tunegate::TUNEGATE_LEVEL
