// The compiled kernels, apart from the launcher: each dtype of features is compiled on its own.
#pragma once

#include "block.h"

namespace siglip::sm90 {

// The kernel for what `block` asks for, as the runtime takes it.
const void* bfloat16_kernel(const Block& block);
const void* float16_kernel(const Block& block);

// Of every one of them.
int kernel_threads();
int kernel_shared_bytes();

}  // namespace siglip::sm90
