// Every kernel of one dtype, SIGLIP_FLOAT16 or bfloat16.

#include "kernel.cuh"
#include "kernels.h"

namespace siglip::sm90 {
namespace {

template <class Operand, bool kGeneral>
const void* kernel_of(const Block& block) {
  const auto kernel = block.dz          ? sigmoid_block_kernel<Operand, kGeneral, Output::kDz>
                      : block.loss_only ? sigmoid_block_kernel<Operand, kGeneral, Output::kLoss>
                                        : sigmoid_block_kernel<Operand, kGeneral, Output::kSums>;
  return reinterpret_cast<const void*>(kernel);
}

template <class Operand>
const void* kernel_of(const Block& block) {
  return block.image_ids || block.image_weights ? kernel_of<Operand, true>(block) : kernel_of<Operand, false>(block);
}

}  // namespace

#if defined(SIGLIP_FLOAT16)
const void* float16_kernel(const Block& block) { return kernel_of<Float16>(block); }
#else
const void* bfloat16_kernel(const Block& block) { return kernel_of<Bfloat16>(block); }
int kernel_threads() { return kThreads; }
int kernel_shared_bytes() { return kSharedBytes; }
#endif

}  // namespace siglip::sm90
