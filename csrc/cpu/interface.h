// What siglip_kernels/backends/cpu.py calls through ctypes. Plain C, because that needs no torch headers, one build
// serves every torch, and a call costs no more than an operator's.
#pragma once

#include "epilogue.h"
#include "machine.h"
#include "parallel.h"

#define SIGLIP_EXPORT extern "C" [[gnu::visibility("default")]]

namespace siglip {

// A BLAS's function, whatever its arguments.
using Gemm = void (*)();

SIGLIP_EXPORT void siglip_machine(Machine* machine);

// dz and sums of a block from its inner products u [rows, cols]; dz may be u.
SIGLIP_EXPORT void siglip_epilogue(const Block* block, const void* u, int64_t u_stride, int32_t level,
                                   ParallelFor pool);

// The same from features x [rows, features], y [cols, features], contiguous, with the gradients. The products are those
// of a BLAS, which brings its own threads: `gemm` is its function for the operand's dtype, sgemm_ or dgemm_, or MKL's
// cblas_gemm_bf16bf16f32 or cblas_gemm_f16f16f32. u: room for the inner products.
SIGLIP_EXPORT void siglip_block_by_blas(const Block* block, const void* x, const void* y, int64_t features, void* u,
                                        int64_t u_stride, Gemm gemm, int32_t level, ParallelFor pool);

#if defined(__x86_64__)
// The same by our own products, of bfloat16 (level avx512_bf16) or float32 (level avx512); the inner products never
// leave the cache. packed: room for y's panels, and for those of the gradients' products.
SIGLIP_EXPORT void siglip_block(const Block* block, const void* x, const void* y, int64_t features, uint32_t* packed,
                                ParallelFor pool);

// Of the same operands; a gradient's, for tests.
void multiply(const Product& product, ParallelFor pool);
#endif

// For tests: one of the vector functions of a level.
SIGLIP_EXPORT void siglip_evaluate(int32_t level, Function function, Dtype dtype, const void* in, void* out,
                                   int64_t count);

}  // namespace siglip
