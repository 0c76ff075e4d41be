// What siglip_kernels/backends/cpu.py calls through ctypes. Plain C, because that needs no torch headers, one build
// serves every torch, and a call costs no more than an operator's.
#pragma once

#include "epilogue.h"
#include "parallel.h"

#define SIGLIP_EXPORT extern "C" [[gnu::visibility("default")]]

namespace siglip {

// The machine's best level, as the numbers of Level.
SIGLIP_EXPORT int32_t siglip_level();
// Whether float16 products run in the machine's own instructions.
SIGLIP_EXPORT int32_t siglip_has_float16_products();

// dz and sums of a block from its inner products u [rows, cols]; dz may be u.
SIGLIP_EXPORT void siglip_epilogue(const Block* block, const void* u, int64_t u_stride, int32_t level,
                                   ParallelFor pool);

#if defined(__x86_64__)
// The same from features x [rows, features], y [cols, features], contiguous, bfloat16 (level avx512_bf16) or float32
// (level avx512), with the gradients; the inner products never leave the cache. packed: room for y's panels, and for
// those of the gradients' products.
SIGLIP_EXPORT void siglip_block(const Block* block, const void* x, const void* y, int64_t features, uint32_t* packed,
                                ParallelFor pool);

// Of the same operands; a gradient's, for tests.
void multiply(const Product& product, ParallelFor pool);
#endif

// For tests: one of the vector functions of a level.
SIGLIP_EXPORT void siglip_evaluate(int32_t level, Function function, Dtype dtype, const void* in, void* out,
                                   int64_t count);

}  // namespace siglip
