// The epilogue of a tile of inner products, compiled once for each instruction set.
#pragma once

#include "params.h"

namespace siglip {

enum class VectorFunction : int32_t { kExp, kLog1p, kToBfloat16, kToFloat16 };

#define SIGLIP_DECLARE_ISA_LEVEL(level)                                                                               \
  namespace level {                                                                                                   \
  /* Writes sums[kNumSums] of the tile rows × cols, kNumStats more if the block has stats, and the tile's dz. */      \
  /* u: the tile's first element. */                                                                                  \
  void epilogue(const BlockParams& params, const void* u, int64_t u_stride, Range rows, Range cols, double* sums);    \
  /* For tests: applies a vector function elementwise. */                                                             \
  void evaluate(VectorFunction function, Dtype dtype, const void* in, void* out, int64_t count);                      \
  }

SIGLIP_DECLARE_ISA_LEVEL(portable)
#if defined(__x86_64__)
SIGLIP_DECLARE_ISA_LEVEL(avx2)
SIGLIP_DECLARE_ISA_LEVEL(avx512)
#endif
#undef SIGLIP_DECLARE_ISA_LEVEL

}  // namespace siglip
