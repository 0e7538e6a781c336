// Varlen causal attention over a flat run of tokens, forward and backward, and decode attention.
//
// A run is a sequence of rows; with prefix > 0 its first row is seen by every other one, in front of its own tokens.
// The work is cut into tasks outside the levels (bind_attention.cpp), so that the cuts depend on the data alone.
#pragma once
#include <cstdint>

namespace tunegate {

struct TokenView {  // (tokens, heads, dim), inner stride 1; strides in elements
  void* data;
  int64_t token, head;
};

struct AttentionShape {
  int64_t heads, kv_heads, dim, value_dim;  // dims: multiples of 8
  int64_t prefix;                           // tokens of the shared first row, 0: none
  int64_t skipped;                          // queries begin after this many tokens of the run: 0 or prefix
  int64_t window;                           // keys a query sees, itself included; tokens + prefix or more: all
  float scale, softcap;                     // softcap 0: none
  bool half;                                // bf16, else fp32
};

// Keys that a task holds at a time: with their gradients some 128 KB.
static inline int64_t key_block(const AttentionShape& s) { return s.dim + s.value_dim > 160 ? 64 : 128; }

struct QueryBlock {  // forward: queries first .. first + count - 1 of the row whose own tokens begin at start
  int64_t start, first, count, prefix;  // prefix: tokens seen in front of the row's own
};

struct AttentionForward {
  AttentionShape shape;
  const QueryBlock* blocks;
  int64_t block_count;
  TokenView q, k, v, out;
  float* lse;  // (query tokens, heads), natural log
};

struct KeyChunk {  // backward: keys first .. first + count - 1 of the row of length tokens at start
  int64_t start, length, first, count;
  int64_t previous;  // the chunk before it in its row, which adds to the row's grad_q first; -1: none
  bool into_prefix;  // the row is the prefix: its gradients go to the first partial sum, not to grad_k and grad_v
};

struct AttentionBackward {
  AttentionShape shape;
  const KeyChunk* chunks;
  int64_t chunk_count;
  const int64_t* starts;  // (rows + 1,)
  int64_t rows, query_tokens;
  int64_t slices;  // of the tokens after the prefix; each sums its own gradient of the prefix's keys
  bool prefix_has_queries;
  TokenView grad_out, q, k, v, out, grad_q, grad_k, grad_v;
  const float* lse;
  // workspace: delta (query_tokens, heads); grad_q sums (query_tokens, heads, dim) if half; partial sums
  // (slices + 1, prefix, kv_heads, dim + value_dim); finished (chunks, kv_heads)
  float *delta, *grad_q_sums, *partial;
  int64_t* finished;
};

struct DecodeAttention {
  AttentionShape shape;  // skipped is not used
  int64_t rows;
  TokenView q, out;                   // token = row
  TokenView prefix_key, prefix_value;  // (prefix, kv_heads, dim)
  void *key, *value;                  // (pages, kv_heads, page_places, dim): strides below, inner two dense
  int64_t key_page, key_head, value_page, value_head;
  const int64_t* pages;  // (rows, pages_each): the pages of a row's own keys, in order
  int64_t pages_each, page_places;
  TokenView new_key, new_value;  // token = row: written to the row's last place first; null data: they lie there
  const int64_t* lengths;        // (rows,), own keys, the query's included
  int64_t rows_each;             // rows of a task
};

}  // namespace tunegate

#define ATTENTION_KERNELS(X)                                             \
  X(void, attention_forward, (const tunegate::AttentionForward& call))   \
  X(void, attention_backward, (const tunegate::AttentionBackward& call)) \
  X(void, decode_attention, (const tunegate::DecodeAttention& call))
