// The CUDA kernel as the emulation launches it, compiled from its source.

#include "kernel.cu"

// The address that csrc's `extern __shared__ smem` has, where the launch puts it: see kMisalignment in libcuda.cpp.
asm(".bss\n.balign 1024\n.skip 272\n.globl _ZN6siglip4sm904smemE\n_ZN6siglip4sm904smemE:\n.skip 262144\n.text");

extern "C" void kernel_siglip_sm90_block(void* const* arguments) {
  using namespace siglip::sm90;
  const auto map = [&](int i) { return *static_cast<const TensorMap*>(arguments[i]); };
  siglip_sm90_block(*static_cast<const BlockParams*>(arguments[0]), map(1), map(2), map(3));
}
