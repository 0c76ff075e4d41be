// Stands in for CUDA's headers on the host: what csrc/cuda/sm90 takes from the compiler and the driver.
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
#define __cluster_dims__(...)
#define __launch_bounds__(...)

// ---- built-in variables and functions ----

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
  return hopper::shfl_sync(hopper::Shuffle::kIdx, value, lane, 31, mask);
}
inline float __shfl_xor_sync(uint32_t mask, float value, int lane_mask) {
  const uint32_t bits = hopper::shfl_sync(hopper::Shuffle::kBfly, reinterpret_cast<uint32_t&>(value), lane_mask, 31, mask);
  return reinterpret_cast<const float&>(bits);
}

// ---- the driver's tensor maps ----

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
using CUresult = int;
constexpr CUresult CUDA_SUCCESS = 0;
struct alignas(64) CUtensorMap_st {
  cuuint64_t opaque[16];
};
using CUtensorMap = CUtensorMap_st;
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

extern "C" CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                           const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                                           CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                           CUtensorMapFloatOOBfill);

// ---- the runtime ----

using cudaStream_t = void*;
enum cudaError_t : int { cudaSuccess = 0, cudaErrorLaunchFailure = 719, cudaErrorNotSupported = 801 };
enum { cudaDevAttrMultiProcessorCount, cudaFuncAttributeMaxDynamicSharedMemorySize, cudaEnableDefault };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
#define CUDART_VERSION 13000

cudaError_t cudaLaunchKernel(const void* kernel, int grid, int block, void** arguments, size_t shared, cudaStream_t);
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int device);
inline cudaError_t cudaFuncSetAttribute(const void*, int, int) { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* devices) { return *devices = 1, cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return hopper_error(); }
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** entry_point, int, int,
                                                    cudaDriverEntryPointQueryResult*) {
  *entry_point = reinterpret_cast<void*>(cuTensorMapEncodeTiled);
  return cudaSuccess;
}
