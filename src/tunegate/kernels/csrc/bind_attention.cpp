// Bindings of attention, and the cut of its work into tasks: by row, block of queries or keys, and kv head.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "attention.h"
#include "recording.h"
#include "table.h"

namespace nb = nanobind;
using namespace tunegate;

namespace {

constexpr int64_t kWholeRow = 512;   // longer rows are cut into chunks of keys in backward
constexpr int64_t kSliceTokens = 256;  // of the tokens that share a prefix, the least for a slice of their own
constexpr int64_t kMostSlices = 16;
constexpr int64_t kPartialFloats = 8 << 20;  // keep the slices' sums below 32 MB

using View = std::tuple<uintptr_t, int64_t, int64_t>;  // address, token stride, head stride
// heads, kv_heads, dim, value_dim, prefix, skipped, window, half
using Shape = std::vector<int64_t>;

TokenView view(const View& v) { return {reinterpret_cast<void*>(std::get<0>(v)), std::get<1>(v), std::get<2>(v)}; }

AttentionShape shape_of(const Shape& n, float scale, float softcap) {
  return {n.at(0), n.at(1), n.at(2), n.at(3), n.at(4), n.at(5), n.at(6), scale, softcap, n.at(7) != 0};
}

const int64_t* integers(uintptr_t address) { return reinterpret_cast<const int64_t*>(address); }

std::vector<QueryBlock> query_blocks(const AttentionShape& s, const int64_t* starts, int64_t rows) {
  int64_t lanes = s.dim > 128 ? 96 : 192, most = std::max<int64_t>(1, lanes / (s.heads / s.kv_heads));
  std::vector<QueryBlock> blocks;
  for (int64_t row = s.skipped ? 1 : 0; row < rows; row++) {
    int64_t length = starts[row + 1] - starts[row], prefix = row ? s.prefix : 0;
    int64_t parts = (length + most - 1) / most;
    for (int64_t part = parts - 1; part >= 0; part--) {
      int64_t first = length * part / parts;
      blocks.push_back({starts[row], first, length * (part + 1) / parts - first, prefix});
    }
  }
  // the most work first, so that the threads finish together
  std::stable_sort(blocks.begin(), blocks.end(), [](const QueryBlock& a, const QueryBlock& b) {
    return a.count * (2 * (a.prefix + a.first) + a.count) > b.count * (2 * (b.prefix + b.first) + b.count);
  });
  return blocks;
}

std::vector<KeyChunk> key_chunks(const AttentionShape& s, const int64_t* starts, int64_t rows) {
  std::vector<int64_t> order;
  for (int64_t row = s.skipped ? 1 : 0; row < rows; row++) order.push_back(row);
  auto length_of = [starts](int64_t row) { return starts[row + 1] - starts[row]; };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return length_of(a) > length_of(b); });
  std::vector<KeyChunk> chunks;
  for (int64_t row : order) {
    int64_t length = length_of(row), each = length > kWholeRow ? key_block(s) : length;
    for (int64_t first = 0; first < length; first += each) {
      int64_t previous = first ? int64_t(chunks.size()) - 1 : -1;
      chunks.push_back({starts[row], length, first, std::min(each, length - first), previous, row == 0 && s.prefix > 0});
    }
  }
  return chunks;
}

int64_t slices_of(const AttentionShape& s, int64_t shared_tokens) {
  int64_t partial = s.prefix * s.kv_heads * (s.dim + s.value_dim);
  int64_t most = std::min(kMostSlices, std::max<int64_t>(1, kPartialFloats / std::max<int64_t>(1, partial)));
  return std::clamp<int64_t>(shared_tokens / kSliceTokens, 1, most);
}

struct Sizes {
  int64_t queries, delta, sums, partial, finished;
};

Sizes sizes(const AttentionShape& s, const int64_t* starts, int64_t rows, size_t chunks) {
  int64_t tokens = starts[rows], queries = tokens - s.skipped;
  int64_t slots = s.prefix ? slices_of(s, tokens - s.prefix) + 1 : 0;
  auto round = [](int64_t n) { return (n + 15) / 16 * 16; };
  return {queries, round(queries * s.heads), s.half ? round(queries * s.heads * s.dim) : 0,
          round(slots * s.prefix * s.kv_heads * (s.dim + s.value_dim)), round(int64_t(chunks) * s.kv_heads * 2)};
}

void forward(const Shape& numbers, float scale, float softcap, uintptr_t starts, int64_t rows, const View& q,
             const View& k, const View& v, const View& out, uintptr_t lse) {
  AttentionShape s = shape_of(numbers, scale, softcap);
  std::vector<QueryBlock> blocks = query_blocks(s, integers(starts), rows);
  AttentionForward call = {s,       blocks.data(), int64_t(blocks.size()), view(q), view(k), view(v), view(out),
                           reinterpret_cast<float*>(lse)};
  nb::gil_scoped_release released;
  active().attention_forward(call);
}

int64_t workspace(const Shape& numbers, uintptr_t starts, int64_t rows) {
  AttentionShape s = shape_of(numbers, 1.0f, 0.0f);
  Sizes n = sizes(s, integers(starts), rows, key_chunks(s, integers(starts), rows).size());
  return n.delta + n.sums + n.partial + n.finished;
}

// views: grad_out, q, k, v, out, grad_q, grad_k, grad_v; work: workspace() floats, aligned to 8 bytes
void backward(const Shape& numbers, float scale, float softcap, uintptr_t starts, int64_t rows,
              const std::vector<View>& views, uintptr_t lse, uintptr_t work) {
  AttentionShape s = shape_of(numbers, scale, softcap);
  std::vector<KeyChunk> chunks = key_chunks(s, integers(starts), rows);
  Sizes n = sizes(s, integers(starts), rows, chunks.size());
  AttentionBackward call = {};
  call.shape = s;
  call.chunks = chunks.data();
  call.chunk_count = int64_t(chunks.size());
  call.starts = integers(starts);
  call.rows = rows;
  call.query_tokens = n.queries;
  call.slices = s.prefix ? slices_of(s, integers(starts)[rows] - s.prefix) : 0;
  call.prefix_has_queries = s.prefix && !s.skipped;
  TokenView* places[] = {&call.grad_out, &call.q,      &call.k,      &call.v,
                         &call.out,      &call.grad_q, &call.grad_k, &call.grad_v};
  for (size_t i = 0; i < 8; i++) *places[i] = view(views.at(i));
  call.lse = reinterpret_cast<const float*>(lse);
  call.delta = reinterpret_cast<float*>(work);
  call.grad_q_sums = call.delta + n.delta;
  call.partial = call.grad_q_sums + n.sums;
  call.finished = reinterpret_cast<int64_t*>(call.partial + n.partial);
  nb::gil_scoped_release released;
  active().attention_backward(call);
}

// views: q, out, prefix key, prefix value, new key, new value; key and value as (address, page stride, head stride);
// pages: (address, pages of a row, places of a page)
void decode(const Shape& numbers, float scale, float softcap, uintptr_t lengths, int64_t rows,
            const std::vector<View>& views, const View& key, const View& value, const View& pages) {
  AttentionShape s = shape_of(numbers, scale, softcap);
  DecodeAttention call = {};
  call.shape = s;
  call.rows = rows;
  TokenView* places[] = {&call.q, &call.out, &call.prefix_key, &call.prefix_value, &call.new_key, &call.new_value};
  for (size_t i = 0; i < 6; i++) *places[i] = view(views.at(i));
  std::tie(call.key_page, call.key_head) = std::make_tuple(std::get<1>(key), std::get<2>(key));
  std::tie(call.value_page, call.value_head) = std::make_tuple(std::get<1>(value), std::get<2>(value));
  call.key = view(key).data;
  call.value = view(value).data;
  call.pages = integers(std::get<0>(pages));
  call.pages_each = std::get<1>(pages);
  call.page_places = std::get<2>(pages);
  call.lengths = integers(lengths);
  // enough rows to share a pass over the prefix, few enough for every thread to have some
  call.rows_each = s.prefix ? std::max<int64_t>(1, 24 / (s.heads / s.kv_heads)) : 1;
  nb::gil_scoped_release released;
  issue([call] { active().decode_attention(call); });
}

}  // namespace

void bind_attention(nb::module_& m) {
  m.def("attention_forward", &forward);
  m.def("attention_workspace", &workspace);
  m.def("attention_backward", &backward);
  m.def("decode_attention", &decode);
}
