// The kernels of one level as a table of functions. Each family's header lists its own as X(result, name, arguments);
// the arguments are plain types and structs of namespace tunegate, the same at every level.
#pragma once
#include "adamw.h"
#include "attention.h"
#include "elementwise.h"
#include "gemm.h"
#include "int8.h"
#include "loss.h"
#include "nf4.h"
#include "segments.h"

#define TUNEGATE_KERNELS(X) \
  ADAMW_KERNELS(X) ATTENTION_KERNELS(X) ELEMENTWISE_KERNELS(X) GEMM_KERNELS(X) INT8_KERNELS(X) LOSS_KERNELS(X) \
  NF4_KERNELS(X) SEGMENTS_KERNELS(X)

namespace tunegate {

struct Kernels {
#define TUNEGATE_MEMBER(result, name, arguments) result(*name) arguments;
  TUNEGATE_KERNELS(TUNEGATE_MEMBER)
#undef TUNEGATE_MEMBER
};

const Kernels& active();    // the table of the level in use
const char* level_name();   // and its name
const char* level_reason();  // why that level
const char* levels_here();  // every level that was compiled in and that this machine can run, comma-separated

}  // namespace tunegate
