// The C interface that siglip_kernels/backends/cpu.py calls through ctypes: it needs no torch headers, one build serves
// every torch version, and a call costs no more than an operator's.
#pragma once

#include "cpu_info.h"
#include "epilogue.h"
#include "parallel.h"

#define SIGLIP_EXPORT extern "C" [[gnu::visibility("default")]]

namespace siglip {

// A BLAS function, cast to its own type before the call.
using BlasGemm = void (*)();

SIGLIP_EXPORT void siglip_machine(CpuInfo* info);

// dz and sums of a block from its inner products u [rows, cols]; dz may be u.
SIGLIP_EXPORT void siglip_epilogue(const BlockParams* params, const void* u, int64_t u_stride, int32_t level,
                                   ParallelFor pool);

// The same from contiguous features x [rows, features], y [cols, features], with the gradients. The GEMMs are a BLAS's,
// on its own threads: `gemm` is the one for the operand's dtype of sgemm_, dgemm_, and MKL's cblas_gemm_bf16bf16f32 and
// cblas_gemm_f16f16f32. u: buffer for the inner products.
SIGLIP_EXPORT void siglip_block_by_blas(const BlockParams* params, const void* x, const void* y, int64_t features,
                                        void* u, int64_t u_stride, BlasGemm gemm, int32_t level, ParallelFor pool);

// out [rows, cols] = x·yᵀ alone; `operand`: Dtype.
SIGLIP_EXPORT void siglip_inner_products_by_blas(void* out, int64_t out_stride, const void* x, const void* y,
                                                 int64_t rows, int64_t cols, int64_t features, int32_t operand,
                                                 BlasGemm gemm);

#if defined(__x86_64__)
// siglip_block_by_blas with the GEMMs of gemm.h, in bfloat16 (level avx512_bf16) or float32 (level avx512). The inner products stay
// in the cache. packed: buffer for the panels of y, and later for those of the gradients' GEMMs.
SIGLIP_EXPORT void siglip_block(const BlockParams* params, const void* x, const void* y, int64_t features,
                                uint32_t* packed, ParallelFor pool);

// siglip_inner_products_by_blas with them.
SIGLIP_EXPORT void siglip_inner_products(float* out, int64_t out_stride, const void* x, const void* y, int64_t rows,
                                         int64_t cols, int64_t features, int32_t operand, uint32_t* packed,
                                         ParallelFor pool);

// A gradient's GEMM on the same operands, declared for tests.
void gemm(const GemmParams& params, ParallelFor pool);
#endif

// For tests: one vector function at one ISA level.
SIGLIP_EXPORT void siglip_evaluate(int32_t level, VectorFunction function, Dtype dtype, const void* in, void* out,
                                   int64_t count);

}  // namespace siglip
