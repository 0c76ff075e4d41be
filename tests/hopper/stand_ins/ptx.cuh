// Stands in for csrc/cuda/sm90/ptx.cuh on the host: the same functions, run by the emulation.
#pragma once

#include "device.h"
#include "params.h"
#include "ptx_arithmetic.h"

namespace siglip::sm90 {

alignas(1024) extern uint8_t smem[];  // an address only: stands for the running CTA's dynamic shared memory

inline uint32_t smem_addr(const void* p) {
  return uint32_t(static_cast<const uint8_t*>(p) - smem) + hopper::dynamic_shared();
}

inline void hide(int&) {}

inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals) { hopper::mbarrier_init(smem_addr(barrier), arrivals); }
inline void fence_mbarrier_init() { hopper::fence_mbarrier_init(); }
inline void mbarrier_arrive(uint64_t* barrier) { hopper::mbarrier_arrive(smem_addr(barrier)); }
inline void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  hopper::mbarrier_arrive_expect_tx(smem_addr(barrier), bytes);
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  while (!hopper::mbarrier_try_wait_parity(smem_addr(barrier), parity)) {
  }
}

inline uint64_t address(const TensorMap* tensor_map) { return reinterpret_cast<uint64_t>(tensor_map); }
inline void tma_load_2d(void* dst, const TensorMap* tensor_map, int column, int row, uint64_t* barrier) {
  hopper::tma_load_2d(smem_addr(dst), address(tensor_map), column, row, smem_addr(barrier));
}
inline void tma_store_2d(const TensorMap* tensor_map, int column, int row, const void* src) {
  hopper::tma_store_2d(address(tensor_map), column, row, smem_addr(src));
}
inline void tma_store_commit_group() { hopper::bulk_commit_group(); }
inline void tma_store_wait_group_read() { hopper::bulk_wait_group(0); }
inline void tma_store_wait_group() { hopper::bulk_wait_group(0); }
inline void fence_proxy_async() { hopper::fence_proxy_async(); }
inline void prefetch_tensormap(const TensorMap* tensor_map) { hopper::prefetch_tensormap(address(tensor_map)); }

inline void named_barrier_sync(int id, int num_threads) { hopper::bar_sync(id, num_threads); }
template <int kRegisters>
void setmaxnreg_dec() {
  hopper::setmaxnreg_dec(kRegisters);
}
template <int kRegisters>
void setmaxnreg_inc() {
  hopper::setmaxnreg_inc(kRegisters);
}

inline void stmatrix_x4(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  hopper::stmatrix_x4(address, {r0, r1, r2, r3});
}

inline uint32_t cvt_bf16x2(float low, float high) {
  return hopper::bits_of_bf16(low) | uint32_t(hopper::bits_of_bf16(high)) << 16;
}
inline uint32_t cvt_f16x2(float low, float high) {
  return hopper::bits_of_f16(low) | uint32_t(hopper::bits_of_f16(high)) << 16;
}

inline void wgmma_fence() { hopper::wgmma_fence(); }
inline void wgmma_commit_group() { hopper::wgmma_commit_group(); }
template <int kPending>
void wgmma_wait_group() {
  hopper::wgmma_wait_group(kPending);
}
template <int kCount>
void wgmma_fence_accumulator(float (&)[kCount]) {}

template <class Element>
void wgmma_m64n128k16(float (&acc)[64], uint64_t a, uint64_t b, bool accumulate) {
  const auto type = Element::kIsBfloat16 ? hopper::Half::kBfloat16 : hopper::Half::kFloat16;
  uint32_t* accumulators[64];
  for (int i = 0; i < 64; ++i) accumulators[i] = reinterpret_cast<uint32_t*>(&acc[i]);
  hopper::track_registers(accumulators[0], 64);
  hopper::wgmma(type, 128, accumulators, a, b, accumulate);
}

}  // namespace siglip::sm90
