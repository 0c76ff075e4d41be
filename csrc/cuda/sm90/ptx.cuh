// PTX instructions of sm_90a as functions, under their PTX names: mbarrier, TMA, setmaxnreg, stmatrix, WGMMA.
#pragma once

#include "params.h"
namespace siglip::sm90 {

__device__ __forceinline__ uint32_t smem_addr(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Hides where a value came from, so that the compiler computes what depends on it here and not ahead of a loop.
__device__ __forceinline__ void hide(int& value) { asm volatile("" : "+r"(value)); }

// ---- mbarrier ----

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_addr(barrier)), "r"(arrivals));
}
// Makes initialised barriers visible to TMA.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_addr(barrier)) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_addr(barrier)), "r"(bytes)
               : "memory");
}
// Waits until the phase of that parity is complete.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(smem_addr(barrier)),
      "r"(parity)
      : "memory");
}

// ---- TMA ----

// Loads the box that starts at (row, column) into shared memory; `barrier` counts the bytes as they arrive.
__device__ __forceinline__ void tma_load_2d(void* dst, const TensorMap* tensor_map, int column, int row,
                                            uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          smem_addr(dst)),
      "l"(tensor_map), "r"(smem_addr(barrier)), "r"(column), "r"(row)
      : "memory");
}
// Elements out of bounds are not written, except those that share a row's last 16 bytes: up to seven.
__device__ __forceinline__ void tma_store_2d(const TensorMap* tensor_map, int column, int row, const void* src) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(tensor_map),
               "r"(smem_addr(src)), "r"(column), "r"(row)
               : "memory");
}
__device__ __forceinline__ void tma_store_commit_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until this thread's stores have read their shared memory, which may then be reused.
__device__ __forceinline__ void tma_store_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ __forceinline__ void tma_store_wait_group() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// Makes this thread's writes to shared memory visible to TMA.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void prefetch_tensormap(const TensorMap* tensor_map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(tensor_map) : "memory");
}

// ---- warpgroups ----

// Synchronizes the `num_threads` threads that use barrier `id`.
__device__ __forceinline__ void named_barrier_sync(int id, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Stores four 8 × 8 matrices of 16-bit elements; lane l passes the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void stmatrix_x4(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r0), "r"(r1),
               "r"(r2), "r"(r3)
               : "memory");
}

// Two floats rounded to nearest even, `low` in the lower half.
__device__ __forceinline__ uint32_t cvt_bf16x2(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
__device__ __forceinline__ uint32_t cvt_f16x2(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// ---- WGMMA ----

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kPending of this warpgroup's groups are in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving reads of the accumulator above wgmma_wait_group, which does not name it.
template <int kCount>
__device__ __forceinline__ void wgmma_fence_accumulator(float (&acc)[kCount]) {
  for (float& value : acc) asm volatile("" : "+f"(value)::"memory");
}

#define SIGLIP_ACC4(i) "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3])
#define SIGLIP_ACC16(i) SIGLIP_ACC4(i), SIGLIP_ACC4(i + 4), SIGLIP_ACC4(i + 8), SIGLIP_ACC4(i + 12)
#define SIGLIP_OPERANDS_0_TO_63                                                                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                             \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                                   \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                                   \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SIGLIP_WGMMA(type)                                                                                             \
  asm volatile(                                                                                                        \
      "{\n"                                                                                                            \
      ".reg .pred accumulate;\n"                                                                                       \
      "setp.ne.b32 accumulate, %66, 0;\n"                                                                              \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" SIGLIP_OPERANDS_0_TO_63                        \
      "}, %64, %65, accumulate, 1, 1, 0, 0;\n"                                                                         \
      "}\n"                                                                                                            \
      : SIGLIP_ACC16(0), SIGLIP_ACC16(16), SIGLIP_ACC16(32), SIGLIP_ACC16(48)                                          \
      : "l"(a), "l"(b), "r"(int32_t(accumulate)))

// acc [64, 128] = a [64, 16] · b [128, 16]ᵀ, or += with `accumulate`. a and b are descriptors; layout.h says which element
// of acc is where.
template <class Element>
__device__ __forceinline__ void wgmma_m64n128k16(float (&acc)[64], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (Element::kIsBfloat16)
    SIGLIP_WGMMA("bf16");
  else
    SIGLIP_WGMMA("f16");
}
#undef SIGLIP_WGMMA
#undef SIGLIP_OPERANDS_0_TO_63
#undef SIGLIP_ACC16
#undef SIGLIP_ACC4

}  // namespace siglip::sm90
