// What makes code compile for the device, by NVRTC or nvcc, and for the host, where it is tested.
#pragma once

#if defined(__CUDACC_RTC__)  // NVRTC, which has no headers
using int32_t = int;
using int64_t = long long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using uintptr_t = unsigned long long;
#define INFINITY __int_as_float(0x7f800000)
#else
#include <math.h>

#include <cstdint>
#endif

#if defined(__CUDACC__)
#define SIGLIP_HOST_DEVICE __host__ __device__ __forceinline__
#define SIGLIP_UNROLL _Pragma("unroll")
#define SIGLIP_NO_UNROLL _Pragma("unroll 1")
#else
#define SIGLIP_HOST_DEVICE inline
#define SIGLIP_UNROLL
#define SIGLIP_NO_UNROLL
#endif
