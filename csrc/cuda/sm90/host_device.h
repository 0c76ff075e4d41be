// Macros for functions that compile for the device and for the host, where they are tested.
#pragma once

#if defined(__CUDACC__)
#define SIGLIP_HOST_DEVICE __host__ __device__ __forceinline__
#define SIGLIP_UNROLL _Pragma("unroll")
#define SIGLIP_NO_UNROLL _Pragma("unroll 1")
#else
#define SIGLIP_HOST_DEVICE inline
#define SIGLIP_UNROLL
#define SIGLIP_NO_UNROLL
#endif
