// The vectorised pass over a tile of inner products, in one version for each instruction set.
#pragma once

#include "block.h"

namespace siglip {

enum class Function : int32_t { kExp, kLog1p, kToBfloat16, kToFloat16 };

#define SIGLIP_DECLARE_LEVEL(level)                                                                            \
  namespace level {                                                                                            \
  /* sums[kSums] of the tile rows × cols of the block, kStats more where it wants stats, and its part of dz; */   \
  /* u points to the tile's first element. */                                                                    \
  void epilogue(const Block& block, const void* u, int64_t u_stride, Range rows, Range cols, double* sums);    \
  /* For tests: the vector functions, element by element. */                                                   \
  void evaluate(Function function, Dtype dtype, const void* in, void* out, int64_t count);                     \
  }

SIGLIP_DECLARE_LEVEL(portable)
#if defined(__x86_64__)
SIGLIP_DECLARE_LEVEL(avx2)
SIGLIP_DECLARE_LEVEL(avx512)
#endif
#undef SIGLIP_DECLARE_LEVEL

}  // namespace siglip
