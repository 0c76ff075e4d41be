// The launches of csrc/cuda/sm90/launch.cu on the emulation, of kernels compiled from their source or from PTX.

#include <cuda.h>

#include "config.h"
#include "params.h"

using siglip::sm90::BlockParams;

// The address that csrc's `extern __shared__ smem` has: 16-byte aligned and no better, as CUDA promises.
asm(".bss\n.balign 1024\n.skip 272\n.globl _ZN6siglip4sm904smemE\n_ZN6siglip4sm904smemE:\n.skip 262144\n.text");
constexpr uint32_t kMisalignment = 272;

namespace {

int multiprocessors = 1;
#if !defined(SIGLIP_FROM_PTX)
using SourceKernel = void (*)(BlockParams, CUtensorMap, CUtensorMap, CUtensorMap);
SourceKernel source_kernel;

void run_source(void* const* arguments) {
  const auto map = [&](int i) { return *static_cast<const CUtensorMap*>(arguments[i]); };
  source_kernel(*static_cast<const BlockParams*>(arguments[0]), map(1), map(2), map(3));
}
#endif

}  // namespace

extern "C" void siglip_sm90_emulate(int count) { multiprocessors = count; }

cudaError_t cudaDeviceGetAttribute(int* value, int, int) { return *value = multiprocessors, cudaSuccess; }

cudaError_t cudaLaunchKernel(const void* kernel, int grid, int block, void** arguments, size_t shared, cudaStream_t) {
#if defined(SIGLIP_FROM_PTX)
  const auto body = reinterpret_cast<hopper::Body>(const_cast<void*>(kernel));
#else
  source_kernel = reinterpret_cast<SourceKernel>(const_cast<void*>(kernel));
  const hopper::Body body = run_source;
#endif
  const int failed = hopper_launch(body, grid, block, siglip::sm90::kClusterSize, uint32_t(shared), kMisalignment, arguments);
  return failed ? cudaErrorLaunchFailure : cudaSuccess;
}
