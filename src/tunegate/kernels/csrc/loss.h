// Softmax cross-entropy over rows of logits: the gradient in place, and running statistics over vocabulary blocks.
#pragma once
#include <cstdint>

namespace tunegate {

// One block of columns of the logits: row r begins at logits + r * stride and holds the columns first..first+columns.
struct LogitsBlock {
  float* logits;
  int64_t rows, columns, stride, first;
  const int64_t* labels;  // (rows), columns of the whole vocabulary
  float scale, softcap;   // logit z = softcap * tanh(scale * l / softcap); softcap 0: z = scale * l
};

// What is known of each row after the blocks so far. Before the first: most -inf, total 0.
struct RowState {
  float* most;    // largest z
  float* total;   // sum of exp(z - most)
  float* target;  // z of the label
};

}  // namespace tunegate

// loss_gradient: losses[r] = log sum exp z - z[label]; the logits become d losses[r] / d l.
// loss_update: takes a block into the state. loss_best: the largest l of each row and its column, the first in a tie.
#define LOSS_KERNELS(X)                                                                   \
  X(void, loss_gradient, (const LogitsBlock& block, float* losses))                       \
  X(void, loss_update, (const LogitsBlock& block, const RowState& state))                 \
  X(void, loss_best, (const LogitsBlock& block, float* best, int64_t* columns))
