// out = column_scale * (alpha * sum of x @ w) + bias + add for several products at a time.
//
// Each product is cut into tiles of its output. A tile's accumulators are fp32 in the thread's second-level cache;
// all terms add to them, one block of k after the other, and the epilogue rounds once. The weights of as many
// columns as the shared buffer holds are packed first (by all threads), then the tiles are computed; a product of few
// rows packs inside its tiles, and one of fewer packs x and streams its weights (gemm_small.h). No sum is ever split
// between threads: the bytes do not depend on their number.
#include "gemm.h"

#include "gemm_bf16.h"
#include "gemm_fp32.h"
#include "gemm_small.h"
#include "level.h"
#include "pool.h"

namespace tunegate::TUNEGATE_LEVEL {
namespace {

constexpr int64_t TILE_ROWS = 96;
constexpr int64_t TILE_COLUMNS = 512;
constexpr int64_t SHARED = 8 << 20;  // bytes of packed weights at a time
constexpr int64_t DIRECT_COLUMNS = 2 * NR;  // for so few columns, x is read in place rather than packed
constexpr int MOST_JOBS = 64;

inline int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
inline int64_t pieces(int64_t n, int64_t step) { return (n + step - 1) / step; }

// How one term's k is cut, and where its packed blocks lie in a unit of PACK columns.
struct Blocks {
  int64_t count, length, start;  // blocks, k of each but the last, floats before the first
  int64_t k_floats;              // floats that a k of PACK columns takes
};

// Some columns of one product whose weights fit the shared buffer.
struct Job {
  const GemmProduct* product;
  bool small, packs_inside;
  int64_t first_column, columns;
  int64_t tile_rows, tile_columns, row_tiles, tiles, packs, unit_floats;
  bool any_bf16;
  float* packed;
  Blocks blocks[kMostTerms];
};

inline void plan_blocks(Job& job) {
  job.unit_floats = 0;
  job.packs = 0;
  for (int t = 0; t < job.product->terms; t++) {
    int64_t k = job.product->term[t].k;
    bool pairs = !job.small && takes_bf16(job.product->term[t]);
    int64_t count = pieces(k, pairs ? KC_BF16 : KC);
    int64_t length = count ? up(pieces(k, count), pairs ? STEP : 4) : 0;
    count = length ? pieces(k, length) : 0;
    job.blocks[t] = {count, length, job.unit_floats, pairs ? PACK / 2 : PACK};
    job.unit_floats += job.blocks[t].k_floats * up(k, 32);
    job.any_bf16 |= pairs;
    job.packs += count;
  }
}

// Columns that a small product computes at a time.
inline int64_t small_step(int64_t m) { return m > W ? TWO : m > FEWEST ? ONE : LINES; }

inline void plan_tiles(Job& job, int64_t wanted_tiles) {
  int64_t m = job.product->m, units = pieces(job.columns, PACK);
  if (job.small) {
    int64_t step = small_step(m), most = up(128, step);
    job.tile_columns = max_of(step, min_of(most, up(pieces(job.columns, wanted_tiles), step)));
    job.row_tiles = 1;
    job.packs = small_panels(m);
    job.tiles = pieces(job.columns, job.tile_columns);
    return;
  }
  int64_t row_tiles = pieces(m, TILE_ROWS), column_tiles = pieces(units, TILE_COLUMNS / PACK);
  while (row_tiles * column_tiles < wanted_tiles && column_tiles < units) column_tiles++;
  while (row_tiles * column_tiles < wanted_tiles && pieces(m, row_tiles) > 4 * MR) row_tiles++;
  if (job.packs_inside) row_tiles = 1;
  job.tile_rows = up(pieces(m, row_tiles), job.any_bf16 ? 32 : MR);
  job.row_tiles = pieces(m, job.tile_rows);
  job.tile_columns = PACK * pieces(units, column_tiles);
  job.tiles = job.row_tiles * pieces(job.columns, job.tile_columns);
}

inline void pack(const GemmTerm& term, int64_t n, int64_t n0, int64_t k0, int64_t kc, float* to) {
#ifdef TUNEGATE_HAS_BF16
  if (takes_bf16(term)) return pack_unit_bf16(term, n, n0, k0, kc, (bf16*)to);
#endif
  pack_unit(term, n, n0, k0, kc, to);
}

// Floats of all of a small product's packed x: term by term, panel by panel.
inline int64_t small_floats(const GemmProduct& p) {
  int64_t k = 0;
  for (int t = 0; t < p.terms; t++) k += p.term[t].k;
  return k * up(p.m, W);
}

inline void pack_small(const Job& job, int64_t panel) {
  const GemmProduct& p = *job.product;
  int64_t width = small_width(p.m, panel), m0 = panel * NR, rows = min_of(width, p.m - m0);
  float* to = job.packed;
  for (int t = 0; t < p.terms; t++) {
    const GemmTerm& term = p.term[t];
    float* own = to + m0 * term.k;
    if (term.x_type == kBf16)
      pack_small_x<bf16>(term, m0, rows, width, own);
    else
      pack_small_x<float>(term, m0, rows, width, own);
    to += term.k * up(p.m, W);
  }
}

inline void pack_task(const Job& job, int64_t index) {
  if (job.small) return pack_small(job, index);
  int64_t unit = index / job.packs, block = index % job.packs;
  int t = 0;
  for (; block >= job.blocks[t].count; t++) block -= job.blocks[t].count;
  const Blocks& blocks = job.blocks[t];
  const GemmTerm& term = job.product->term[t];
  int64_t k0 = block * blocks.length, kc = min_of(blocks.length, term.k - k0);
  float* to = job.packed + unit * job.unit_floats + blocks.start + blocks.k_floats * k0;
  pack(term, job.product->n, job.first_column + unit * PACK, k0, kc, to);
}

struct Tile {
  const Job* job;
  int64_t m0, rows, n0, columns;  // columns counted from the product's first
  int64_t panel_floats;            // of one panel of accumulators: c[panel][row][NR]
  float* c;
};

struct BlockOfK {
  const GemmTerm* term;
  int64_t k0, kc, start;  // start: floats before the block in a unit
  bool first;
};

// The packed weights of the unit of PACK columns at u of the tile.
inline const float* unit_of(const Tile& tile, const BlockOfK& block, int64_t u) {
  const Job& job = *tile.job;
  int64_t column = tile.n0 + u;
  if (!job.packs_inside)
    return job.packed + (column - job.first_column) / PACK * job.unit_floats + block.start;
  float* inside = (float*)scratch(PACK * KC_BF16 * 4, 2);
  pack(*block.term, job.product->n, column, block.k0, block.kc, inside);
  return inside;
}

inline void block_fp32(const Tile& tile, const BlockOfK& block) {
  const GemmTerm& term = *block.term;
  int64_t kc = block.kc;
  bool direct = !tile.job->packs_inside && tile.columns <= DIRECT_COLUMNS && !term.x_is_km && term.x_type == kFp32;
  float* packed_x = (float*)scratch((TILE_ROWS + MR) * (KC + 1) * 4, 0);
  if (!direct && term.x_type == kFp32) pack_rows<float>(term, tile.m0, tile.rows, block.k0, kc, packed_x);
  if (!direct && term.x_type == kBf16) pack_rows<bf16>(term, tile.m0, tile.rows, block.k0, kc, packed_x);
  const float* x = (const float*)term.x + tile.m0 * term.x_stride + block.k0;
  for (int64_t u = 0; u < tile.columns; u += PACK) {
    const float* unit = unit_of(tile, block, u);
    for (int64_t j = 0; j < min_of(PACK, tile.columns - u); j += NR) {
      float* c = tile.c + (u + j) / NR * tile.panel_floats;
      const float* w = unit + j * kc;
      bool narrow = tile.columns - u - j <= W;
      for (int64_t r = 0; r < tile.rows; r += MR) {
        bool in_place = direct && r + MR <= tile.rows;
        if (direct && !in_place)
          pack_sliver_mk(x + r * term.x_stride, term.x_stride, tile.rows - r, kc, packed_x);
        const float* a = in_place ? x + r * term.x_stride : direct ? packed_x : packed_x + r * kc;
        if (narrow)
          micro<1>(a, in_place ? term.x_stride : 1, in_place ? 1 : MR, w, kc, c + r * NR, block.first);
        else if (in_place)
          micro<2>(a, term.x_stride, 1, w, kc, c + r * NR, block.first);
        else
          micro<2>(a, 1, MR, w, kc, c + r * NR, block.first);
      }
    }
  }
}

#ifdef TUNEGATE_HAS_BF16
inline void block_bf16(const Tile& tile, const BlockOfK& block) {
  const GemmTerm& term = *block.term;
  int64_t padded = up(block.kc, STEP), stride = term.x_stride;
  const bf16* x = (const bf16*)term.x + tile.m0 * stride + block.k0;
  if (term.x_is_km || tile.rows % 16 || block.kc % STEP) {
    bf16* copy = (bf16*)scratch(up(TILE_ROWS, 32) * KC_BF16 * 2, 0);
    pack_rows_bf16(term, tile.m0, tile.rows, block.k0, block.kc, copy);
    x = copy, stride = padded;
  }
  for (int64_t u = 0; u < tile.columns; u += PACK) {
    const bf16* unit = (const bf16*)unit_of(tile, block, u);
    for (int64_t j = 0; j < min_of(PACK, tile.columns - u); j += NR) {
      float* c = tile.c + (u + j) / NR * tile.panel_floats;
      for (int64_t r = 0; r < tile.rows; r += 32)
        micro_bf16(x + r * stride, stride, up(min_of(32, tile.rows - r), 16), unit + j * padded, padded / STEP,
                   c + r * NR, block.first);
    }
  }
}
#endif

inline void block_of_k(const Tile& tile, const BlockOfK& block) {
#ifdef TUNEGATE_HAS_BF16
  if (takes_bf16(*block.term)) return block_bf16(tile, block);
#endif
  block_fp32(tile, block);
}

// One row of the epilogue over `n` <= NR columns from column j.
template <typename T>
inline void finish(const GemmProduct& p, const float* c, T* out, const T* add, int64_t j, int64_t n) {
  bool whole = n == W;
  vfloat v = load(c) * p.alpha;
  auto part = [&](const auto* from) { return whole ? load(from) : load_part(from, n); };
  if (p.column_scale) v = v * part(p.column_scale + j);
  if (p.bias) v = v + (p.bias_type == kBf16 ? part((const bf16*)p.bias + j) : part((const float*)p.bias + j));
  if (add) v = v + part(add);
  if (whole)
    store(out, v);
  else
    store_part(out, v, n);
}

template <typename T>
inline void epilogue(const Tile& tile) {
  const GemmProduct& p = *tile.job->product;
  for (int64_t r = 0; r < tile.rows; r++) {
    T* out = (T*)p.out + (tile.m0 + r) * p.out_stride + tile.n0;
    const T* add = p.add ? (const T*)p.add + (tile.m0 + r) * p.add_stride + tile.n0 : nullptr;
    for (int64_t j = 0; j < tile.columns; j += W) {
      const float* c = tile.c + j / NR * tile.panel_floats + r * NR + j % NR;
      finish(p, c, out + j, add ? add + j : nullptr, tile.n0 + j, min_of(W, tile.columns - j));
    }
  }
}

inline void tile_task(const Job& job, int64_t index) {
  const GemmProduct& p = *job.product;
  Tile tile{};
  tile.job = &job;
  tile.m0 = index % job.row_tiles * job.tile_rows;
  tile.rows = min_of(job.tile_rows, p.m - tile.m0);
  int64_t offset = index / job.row_tiles * job.tile_columns;
  tile.n0 = job.first_column + offset;
  tile.columns = min_of(job.tile_columns, job.columns - offset);
  tile.panel_floats = up(job.tile_rows + MR, 32) * NR;  // both kernels write whole steps of rows
  int64_t bytes = pieces(tile.columns, NR) * tile.panel_floats * 4;
  tile.c = (float*)scratch(bytes, 1);
  bool first = true;
  if (job.any_bf16) open_tiles();
  for (int t = 0; t < p.terms; t++) {
    const Blocks& blocks = job.blocks[t];
    for (int64_t b = 0; b < blocks.count; b++) {
      int64_t k0 = b * blocks.length;
      int64_t kc = min_of(blocks.length, p.term[t].k - k0);
      block_of_k(tile, {&p.term[t], k0, kc, blocks.start + blocks.k_floats * k0, first});
      first = false;
    }
  }
  if (job.any_bf16) close_tiles();
  if (first) memset(tile.c, 0, size_t(bytes));
  if (p.out_type == kBf16)
    epilogue<bf16>(tile);
  else
    epilogue<float>(tile);
}

// Every block of k of every term of a small product: body(term, first k, their number, x of that term from that k on in
// a panel of one row more each k, whether it is the first).
template <typename F>
inline void small_blocks(const Job& job, F&& body) {
  const GemmProduct& p = *job.product;
  const float* x = job.packed;
  bool first = true;
  for (int t = 0; t < p.terms; t++) {
    const Blocks& blocks = job.blocks[t];
    for (int64_t b = 0; b < blocks.count; b++) {
      int64_t k0 = b * blocks.length;
      body(p.term[t], k0, min_of(blocks.length, p.term[t].k - k0), x, first);
      first = false;
    }
    x += p.term[t].k * up(p.m, W);
  }
}

// R rows of w from n0 on against all of x, to the tile's accumulators.
template <int R>
inline void small_columns(const Tile& tile, int64_t n0, float* buffer, float* c) {
  const Job& job = *tile.job;
  const GemmProduct& p = *job.product;
  memset(c, 0, size_t(up(p.m, W) * R) * 4);
  small_blocks(job, [&](const GemmTerm& term, int64_t k0, int64_t kc, const float* x, bool first) {
    Ahead ahead(term, n0, R, k0);
    if (term.w_type == kBf16 && p.m <= NR && n0 + R <= p.n) {
      const bf16* w = (const bf16*)term.w + n0 * term.w_stride + k0;
      if (p.m <= W)
        small_micro<R, 1>(w, term.w_stride, ahead, x + k0 * W, kc, c, first);
      else
        small_micro<R < ONE ? R : 1, 2>(w, term.w_stride, ahead, x + k0 * NR, kc, c, first);
      return;
    }
    SmallRows rows = small_rows(term, p.n, n0, R, k0, kc, buffer);
    for (int64_t panel = 0; panel < small_panels(p.m); panel++) {
      int64_t m0 = panel * NR;
      const float* own = x + m0 * term.k;
      if (small_width(p.m, panel) == W)
        small_block<R, 1>(rows, ahead, own + k0 * W, kc, c + m0 * R, first);
      else
        small_block<R < ONE ? R : 1, 2>(rows, ahead, own + k0 * NR, kc, c + m0 * R, first);  // ONE rows come with W lanes
      ahead = {};
    }
  });
  for (int64_t m = 0; m < p.m; m++) {
    int64_t panel = m / NR, width = small_width(p.m, panel);
    const float* from = c + panel * NR * R + m % NR;
    for (int64_t r = 0; r < min_of(R, tile.n0 + tile.columns - n0); r++) {
      int64_t column = n0 + r - tile.n0;
      tile.c[column / NR * tile.panel_floats + m * NR + column % NR] = from[r * width];
    }
  }
}

// LINES rows of w from n0 on against R rows of x.
template <int R>
inline void fewest_columns(const Tile& tile, int64_t n0, float* buffer, float* c) {
  const GemmProduct& p = *tile.job->product;
  memset(c, 0, size_t(R * LINES) * 4);
  small_blocks(*tile.job, [&](const GemmTerm& term, int64_t k0, int64_t kc, const float* x, bool first) {
    fewest_block<R>(term, p.n, n0, k0, kc, x + k0 * W, buffer, c, first);
  });
  for (int64_t i = 0; i < min_of(LINES, tile.n0 + tile.columns - n0); i++) {
    int64_t column = n0 + i - tile.n0;
    for (int64_t r = 0; r < R; r++)
      tile.c[column / NR * tile.panel_floats + r * NR + column % NR] = c[r * LINES + i];
  }
}

inline void small_task(const Job& job, int64_t index) {
  const GemmProduct& p = *job.product;
  Tile tile{};
  tile.job = &job;
  tile.rows = p.m;
  tile.n0 = index * job.tile_columns;
  tile.columns = min_of(job.tile_columns, p.n - tile.n0);
  tile.panel_floats = p.m * NR;
  int64_t floats = up(pieces(tile.columns, NR) * tile.panel_floats, 16), sums = max_of(up(p.m, W) * ONE, FEWEST * LINES);
  tile.c = (float*)scratch((floats + sums + max_of(ONE, LINES) * KC) * 4, 1);
  float *c = tile.c + floats, *buffer = c + sums;
  for (int64_t n0 = tile.n0; n0 < tile.n0 + tile.columns; n0 += small_step(p.m)) {
    if (p.m > W)
      small_columns<TWO>(tile, n0, buffer, c);
    else if (p.m > FEWEST)
      small_columns<ONE>(tile, n0, buffer, c);
    else if (p.m == 1)
      fewest_columns<1>(tile, n0, buffer, c);
    else if (p.m == 2)
      fewest_columns<2>(tile, n0, buffer, c);
    else if (p.m == 3)
      fewest_columns<3>(tile, n0, buffer, c);
    else if (p.m == 4)
      fewest_columns<4>(tile, n0, buffer, c);
    else
      fewest_columns<5>(tile, n0, buffer, c);
  }
  if (p.out_type == kBf16)
    epilogue<bf16>(tile);
  else
    epilogue<float>(tile);
}

// Jobs whose packed weights share the buffer: packed together, computed together.
struct Batch {
  Job jobs[MOST_JOBS];
  int count = 0;
  int64_t floats = 0;
};

template <typename F>
inline void over_jobs(const Batch& batch, int64_t (*size)(const Job&), F&& body) {
  int64_t total = 0;
  for (int j = 0; j < batch.count; j++) total += size(batch.jobs[j]);
  parallel(total, [&](int64_t index) {
    int j = 0;
    for (int64_t own; index >= (own = size(batch.jobs[j])); j++) index -= own;
    body(batch.jobs[j], index);
  });
}

inline void run_batch(Batch& batch) {
  if (!batch.count) return;
  float* shared = (float*)scratch(batch.floats * 4, 3);
  for (int j = 0; j < batch.count; j++) {
    Job& job = batch.jobs[j];
    job.packed = shared;
    shared += job.small ? small_floats(*job.product) : job.packs_inside ? 0 : pieces(job.columns, PACK) * job.unit_floats;
  }
  over_jobs(batch, [](const Job& job) {
    return job.small ? job.packs : job.packs_inside ? 0 : pieces(job.columns, PACK) * job.packs;
  }, pack_task);
  over_jobs(batch, [](const Job& job) { return job.tiles; }, [](const Job& job, int64_t index) {
    if (job.small)
      small_task(job, index);
    else
      tile_task(job, index);
  });
  batch.count = 0;
  batch.floats = 0;
}

inline void add_product(Batch& batch, const GemmProduct& p, int64_t wanted_tiles) {
  if (p.m == 0 || p.n == 0) return;
  Job job{};
  job.product = &p;
  bool units = false;
  for (int t = 0; t < p.terms; t++) units |= takes_bf16(p.term[t]);
  job.small = is_small(p, units);
  job.packs_inside = p.m <= TILE_ROWS;
  plan_blocks(job);
  for (int64_t column = 0; column < p.n;) {
    job.first_column = column;
    job.columns = p.n - column;
    int64_t floats = job.small ? small_floats(p) : 0;
    if (!job.small && !job.packs_inside) {
      int64_t units = (SHARED / 4 - batch.floats) / max_of(job.unit_floats, 1);
      int64_t least = min_of(pieces(job.columns, PACK), 4);
      if (units < least && batch.count) {
        run_batch(batch);
        continue;
      }
      job.columns = min_of(job.columns, max_of(units, least) * PACK);
      floats = pieces(job.columns, PACK) * job.unit_floats;
    }
    if (batch.count == MOST_JOBS) {
      run_batch(batch);
      continue;
    }
    plan_tiles(job, wanted_tiles);
    batch.floats += floats;
    batch.jobs[batch.count++] = job;
    column += job.columns;
  }
}

}  // namespace

void gemm(const GemmProduct* products, int64_t count) {
  Batch batch;
  int64_t wanted_tiles = threads() == 1 ? 1 : 6 * threads();
  for (int64_t i = 0; i < count; i++) add_product(batch, products[i], wanted_tiles);
  run_batch(batch);
}

}  // namespace tunegate::TUNEGATE_LEVEL
