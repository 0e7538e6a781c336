// Low-rank updates of different adapters on different rows of one batch (Punica, arXiv:2310.18547; S-LoRA,
// arXiv:2311.03285): out[rows] = gain * (out[rows] - bias + scale * (x[rows] A^T) B^T) + bias, segment by segment.
//
// A segment is a run of rows with one adapter. The projections of a call share x; each adapter's factors on each of
// them come from a table. gain is DoRA's magnitude over its norm.
#pragma once
#include <cstdint>

namespace tunegate {

struct Segment {
  int64_t begin, end, slot;  // rows, and the adapter's line of the table
};

struct Factors {     // of one adapter on one projection; rank 0: none
  const void* a;     // (rank, k)
  const void* b;     // (rank, n): B transposed
  const float* gain;  // (n,), or null
  int64_t rank;
  double scale;
};

struct SegmentTarget {  // one projection's output over all rows
  void* out;            // (rows, n) of x's type
  int64_t stride, n;
  const void* bias;  // (n,), or null
  int32_t bias_type;
  int64_t column;  // of the table
};

constexpr int kMostTargets = 4;

struct SegmentsCall {
  const void* x;  // (rows, k)
  int64_t x_stride, k, rows;
  int32_t type, factor_type;  // GemmType
  const int64_t* segments;    // their number, then a Segment each: read at the call, so that a recorded one sees others
  const Factors* table;       // (slots, columns)
  int64_t columns, most_rank;
  int targets;
  SegmentTarget target[kMostTargets];
  float* work;  // (targets, rows, most_rank), then (rows, k) if type is bf16
};

// A factor in a file's bytes, and where its values go: (rows, columns) fp32 at any address, to aligned fp32 or bf16 of
// the same shape or transposed.
struct LayOut {
  const void* from;
  void* to;
  int64_t rows, columns;
  int32_t transposed;
};

}  // namespace tunegate

// lay_out: on the calling thread alone. largest[transposed]: the largest bits of a magnitude among the values of either
// kind, so that 0 says all are zero, and 0x7f800000 or more that some value is not finite.
#define SEGMENTS_KERNELS(X) \
  X(void, add_segments, (const tunegate::SegmentsCall& call)) \
  X(void, lay_out, (const tunegate::LayOut* parts, int64_t count, int32_t type, uint32_t* largest))
