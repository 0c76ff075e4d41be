// One compilation of the kernel, for the Element, Pairs and Output that siglip_kernels/backends/cuda/kernels.py defines.

#include "kernel.cuh"

namespace siglip::sm90 {

// What the launcher takes for granted.
static_assert(kBlockM == SIGLIP_TILE && kBlockN == SIGLIP_TILE && kPartialsPerTile == SIGLIP_PARTIALS);
static_assert(kNumThreads == SIGLIP_THREADS && kSmemBytes == SIGLIP_SHARED_BYTES);
static_assert(sizeof(BlockParams) == SIGLIP_PARAMS_BYTES);

extern "C" __global__ void __launch_bounds__(kNumThreads, 1)
    siglip_sm90_block(const __grid_constant__ BlockParams params, const __grid_constant__ TensorMap x_map,
                      const __grid_constant__ TensorMap y_map, const __grid_constant__ TensorMap dz_map) {
  sigmoid_block<SIGLIP_ELEMENT, Pairs::SIGLIP_PAIRS, Output::SIGLIP_OUTPUT>(params, x_map, y_map, dz_map);
}

}  // namespace siglip::sm90
