// The instantiated kernels as the launcher sees them: each dtype is a compilation unit of its own.
#pragma once

#include "params.h"

namespace siglip::sm90 {

// The instantiation for `params`, as cudaLaunchKernel takes it.
const void* select_bfloat16_kernel(const BlockParams& params);
const void* select_float16_kernel(const BlockParams& params);

// The same for every instantiation.
int threads_per_block();
int smem_bytes();

}  // namespace siglip::sm90
