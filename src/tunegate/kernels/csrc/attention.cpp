// The attention kernels of a level: which tasks run in which order. How a task computes is in the included parts.
#include "attention.h"

#include "attention_backward.h"
#include "attention_bf16.h"
#include "attention_decode.h"
#include "attention_forward.h"
#include "level.h"
#include "pool.h"

namespace tunegate::TUNEGATE_LEVEL {
namespace {

#ifdef TUNEGATE_HAS_BF16
using HalfForward = MatrixForward;
using HalfBackward = MatrixBackward;
#else
using HalfForward = VectorForward<bf16>;
using HalfBackward = VectorBackward<bf16>;
#endif

constexpr int64_t kTokensEach = 64;  // of a task that only passes over tokens

template <typename T, typename B>
void backward(const AttentionBackward& call) {
  const AttentionShape& s = call.shape;
  TokenView sums = {call.grad_q_sums, s.heads * s.dim, s.dim};
  View<float> grad_q(s.half ? sums : call.grad_q);
  int64_t passes = (call.query_tokens + kTokensEach - 1) / kTokensEach;
  parallel(passes, [&](int64_t i) {
    prepare_tokens<T>(call, grad_q, i * kTokensEach, min_of(call.query_tokens, (i + 1) * kTokensEach));
  });
  memset(call.finished, 0, size_t(call.chunk_count * s.kv_heads) * 8);
  parallel(call.chunk_count * s.kv_heads,
           [&](int64_t i) { chunk_gradients<T, B>(call, grad_q, i / s.kv_heads, i % s.kv_heads); });
  if (s.prefix) {
    parallel(call.slices * s.kv_heads,
             [&](int64_t i) { prefix_gradients<B>(call, grad_q, i / s.kv_heads, i % s.kv_heads); });
    parallel(s.prefix, [&](int64_t t) {
      for (int64_t kv = 0; kv < s.kv_heads; kv++) sum_partials<T>(call, t, kv);
    });
  }
  if (!s.half) return;
  parallel(passes, [&](int64_t i) {
    View<T> to(call.grad_q);
    for (int64_t t = i * kTokensEach; t < min_of(call.query_tokens, (i + 1) * kTokensEach); t++)
      put_rows(grad_q.at(t, 0), s.dim, s.heads, s.dim, to.at(t, 0), to.head);
  });
}

}  // namespace

void attention_forward(const AttentionForward& call) {
  int64_t heads = call.shape.kv_heads;
  parallel(call.block_count * heads, [&](int64_t i) {
    const QueryBlock& block = call.blocks[i / heads];
    if (call.shape.half)
      forward_block<bf16, HalfForward>(call, block, i % heads);
    else
      forward_block<float, VectorForward<float>>(call, block, i % heads);
  });
}

void attention_backward(const AttentionBackward& call) {
  if (call.shape.half)
    backward<bf16, HalfBackward>(call);
  else
    backward<float, VectorBackward<float>>(call);
}

void decode_attention(const DecodeAttention& call) {
  int64_t heads = call.shape.kv_heads, parts = (call.rows + call.rows_each - 1) / call.rows_each;
  constexpr int64_t puts = 16;  // rows that a task writes the new keys of: before all else, other rows may see them
  if (call.new_key.data)
    parallel((call.rows + puts - 1) / puts, [&](int64_t i) {
      for (int64_t row = i * puts; row < min_of(call.rows, (i + 1) * puts); row++)
        for (int64_t kv = 0; kv < heads; kv++)
          call.shape.half ? put_new<bf16>(call, row, kv) : put_new<float>(call, row, kv);
    });
  parallel(parts * heads, [&](int64_t i) {
    int64_t begin = i / heads * call.rows_each, end = min_of(call.rows, begin + call.rows_each);
    if (call.shape.half)
      decode_rows<bf16, HalfForward>(call, begin, end, i % heads);
    else
      decode_rows<float, VectorForward<float>>(call, begin, end, i % heads);
  });
}

}  // namespace tunegate::TUNEGATE_LEVEL
