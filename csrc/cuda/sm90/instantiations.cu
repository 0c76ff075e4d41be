// Instantiates the kernels of one dtype: float16 with SIGLIP_FLOAT16, bfloat16 otherwise.

#include "instantiations.h"
#include "kernel.cuh"

namespace siglip::sm90 {
namespace {

template <class Element, Pairs kPairs>
const void* select_kernel(const BlockParams& params) {
  auto kernel = params.dz          ? sigmoid_block_kernel<Element, kPairs, Output::kDz>
                : params.loss_only ? sigmoid_block_kernel<Element, kPairs, Output::kLoss>
                                   : sigmoid_block_kernel<Element, kPairs, Output::kSums>;
  // Small problems; they have nothing for a cluster to share.
  if constexpr (kPairs != Pairs::kOffset && kClusterSize == 1)
    if (params.dz && params.float32_dz) kernel = sigmoid_block_kernel<Element, kPairs, Output::kFloat32Dz>;
  return reinterpret_cast<const void*>(kernel);
}

template <class Element>
const void* select_kernel(const BlockParams& params) {
  if (params.stats) return select_kernel<Element, Pairs::kStats>(params);
  return params.image_ids || params.image_weights || params.float32_dz ? select_kernel<Element, Pairs::kGeneral>(params)
                                                                       : select_kernel<Element, Pairs::kOffset>(params);
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
