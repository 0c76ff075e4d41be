// Instantiates the kernels of one dtype: float16 with SIGLIP_FLOAT16, bfloat16 otherwise.

#include "instantiations.h"
#include "kernel.cuh"

namespace siglip::sm90 {
namespace {

template <class Element, bool kGeneral>
const void* select_kernel(const BlockParams& params) {
  const auto kernel = params.dz          ? sigmoid_block_kernel<Element, kGeneral, Output::kDz>
                      : params.loss_only ? sigmoid_block_kernel<Element, kGeneral, Output::kLoss>
                                         : sigmoid_block_kernel<Element, kGeneral, Output::kSums>;
  return reinterpret_cast<const void*>(kernel);
}

template <class Element>
const void* select_kernel(const BlockParams& params) {
  return params.image_ids || params.image_weights ? select_kernel<Element, true>(params)
                                                  : select_kernel<Element, false>(params);
}

}  // namespace

#if defined(SIGLIP_FLOAT16)
const void* select_float16_kernel(const BlockParams& params) { return select_kernel<Float16>(params); }
#else
const void* select_bfloat16_kernel(const BlockParams& params) { return select_kernel<Bfloat16>(params); }
int threads_per_block() { return kNumThreads; }
int smem_bytes() { return kSmemBytes; }
#endif

}  // namespace siglip::sm90
