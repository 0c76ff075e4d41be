// Stands in for CUDA's compiler on the host: its words, built-in variables and functions that csrc/cuda/sm90 uses.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "machine.h"

#define __device__
#define __host__
#define __global__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Coordinate {
  uint32_t (*read)();
  operator uint32_t() const { return read(); }
};
struct Coordinates {
  Coordinate x;
};
constexpr Coordinates threadIdx{{hopper::tid_x}}, blockIdx{{hopper::ctaid_x}}, gridDim{{hopper::nctaid_x}};

inline void __syncthreads() { hopper::bar_sync(0, 0); }
inline bool __any_sync(uint32_t mask, bool predicate) { return hopper::vote_any(predicate, mask); }
inline bool __all_sync(uint32_t mask, bool predicate) { return hopper::vote_all(predicate, mask); }
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __ffs(uint32_t bits) { return __builtin_ffs(bits); }
inline int __shfl_sync(uint32_t mask, int value, int lane) {
  return hopper::shfl_idx(value, lane, 31, mask);
}
inline float __shfl_xor_sync(uint32_t mask, float value, int lane_mask) {
  const uint32_t bits = hopper::shfl_bfly(reinterpret_cast<uint32_t&>(value), lane_mask, 31, mask);
  return reinterpret_cast<const float&>(bits);
}
