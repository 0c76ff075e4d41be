// Hopper's instructions as functions: barriers, bulk tensor copies, warpgroup products.
#pragma once

#include <cuda.h>
#include <cstdint>

namespace siglip::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- mbarrier ----

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}
// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Until the phase of that parity is complete.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- bulk tensor copies ----

// A box of `map` whose first element is (row, column), into shared memory; `barrier` counts its bytes.
__device__ __forceinline__ void load_box(void* to, const CUtensorMap* map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}
// What lies out of range is not written, save the rest of a row's last 16 bytes: up to seven elements.
__device__ __forceinline__ void store_box(const CUtensorMap* map, int column, int row, const void* from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(shared_address(from)), "r"(column), "r"(row)
               : "memory");
}
__device__ __forceinline__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until this thread's stores have read their shared memory.
__device__ __forceinline__ void store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// Makes this thread's writes to shared memory visible to the copy engine.
__device__ __forceinline__ void store_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// ---- threads ----

// Of the `threads` that name the same `id`.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
template <int kRegisters>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Four 8 × 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r0), "r"(r1),
               "r"(r2), "r"(r3)
               : "memory");
}

// ---- warpgroup products ----

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending of this warpgroup's groups are under way.
template <int kPending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// No use of a result may be moved to before the wait, which does not name it.
__device__ __forceinline__ void products_end(float (&acc)[64]) {
  for (float& value : acc) asm volatile("" : "+f"(value)::"memory");
}

// Rows of 128 bytes, in the 128-byte swizzle that the copy engine writes; eight rows are 1024 bytes.
__device__ __forceinline__ uint64_t operand_descriptor(const void* rows) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62, kStride = uint64_t(1024 >> 4) << 32, kUnused = uint64_t(1) << 16;
  return kSwizzle128 | kStride | kUnused | ((shared_address(rows) & 0x3ffff) >> 4);
}
// As a descriptor counts bytes.
__device__ constexpr uint64_t descriptor_bytes(int bytes) { return bytes >> 4; }

#define SIGLIP_ACC4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SIGLIP_ACC16(d, i) SIGLIP_ACC4(d, i), SIGLIP_ACC4(d, i + 4), SIGLIP_ACC4(d, i + 8), SIGLIP_ACC4(d, i + 12)
#define SIGLIP_WGMMA(type)                                                                                     \
  asm volatile(                                                                                                \
      "{\n"                                                                                                    \
      ".reg .pred accumulate;\n"                                                                               \
      "setp.ne.b32 accumulate, %66, 0;\n"                                                                      \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                             \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "   \
      "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "   \
      "%62, %63}, %64, %65, accumulate, 1, 1, 0, 0;\n"                                                         \
      "}\n"                                                                                                    \
      : SIGLIP_ACC16(acc, 0), SIGLIP_ACC16(acc, 16), SIGLIP_ACC16(acc, 32), SIGLIP_ACC16(acc, 48)              \
      : "l"(a), "l"(b), "r"(int32_t(accumulate)))

// acc [64, 128] = a [64, 16] · b [128, 16]ᵀ, or +=. Thread t holds row t / 32 · 16 + t % 32 / 4 (+ 8 where i & 2),
// columns i / 4 · 8 + t % 4 · 2 (+ 1 where i & 1).
template <class Operand>
__device__ __forceinline__ void multiply(float (&acc)[64], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (Operand::kIsBfloat16)
    SIGLIP_WGMMA("bf16");
  else
    SIGLIP_WGMMA("f16");
}
#undef SIGLIP_WGMMA
#undef SIGLIP_ACC16
#undef SIGLIP_ACC4

}  // namespace siglip::sm90
