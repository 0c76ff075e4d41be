// What siglip_kernels/backends/cuda.py calls through ctypes: plain C, so that no torch header and no ABI matters.

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "kernels.h"
#include "pipeline.h"
#include "tiles.h"

#define SIGLIP_EXPORT extern "C" __attribute__((visibility("default")))

namespace siglip::sm90 {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found at run time: the library must load where there is no driver.
Encode find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
  cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  return reinterpret_cast<Encode>(found);
}

// What of a block the driver would not describe; a negative error of the launcher.
enum Operand : int32_t { kX = -1, kY = -2, kDz = -3 };

// Of a matrix [rows, cols], in boxes of [box_rows, 64], swizzled; out of range it reads 0.
bool describe(Encode encode, CUtensorMap* map, Dtype dtype, const void* data, int64_t rows, int64_t cols,
              int64_t stride, int box_rows) {
  const auto type = dtype == Dtype::kBfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t sizes[] = {cuuint64_t(cols), cuuint64_t(rows)}, strides[] = {cuuint64_t(stride) * 2};
  const cuuint32_t box[] = {64, cuuint32_t(box_rows)}, steps[] = {1, 1};
  return encode(map, type, 2, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

int32_t launch(const Block& block, cudaStream_t stream) {
  static const Encode encode = find_encode();
  if (!encode) return cudaErrorNotSupported;
  int multiprocessors;
  CUtensorMap x, y, dz{};
  cudaError_t error = cudaSetDevice(block.device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, block.device);
  if (error != cudaSuccess) return error;
  if (!describe(encode, &x, block.dtype, block.x, block.rows, block.features, block.x_stride, kBlockM)) return kX;
  if (!describe(encode, &y, block.dtype, block.y, block.cols, block.features, block.y_stride, kBlockN)) return kY;
  if (block.dz && !describe(encode, &dz, block.dtype, block.dz, block.rows, block.cols, block.dz_stride, kBlockM))
    return kDz;
  const void* const kernel = block.dtype == Dtype::kBfloat16 ? bfloat16_kernel(block) : float16_kernel(block);
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel_shared_bytes());
  if (error != cudaSuccess) return error;
  const int programs = std::min(multiprocessors, Tiles(block.rows, block.cols).count());
  void* arguments[] = {const_cast<Block*>(&block), &x, &y, &dz};
  return cudaLaunchKernel(kernel, programs, kernel_threads(), arguments, kernel_shared_bytes(), stream);
}

}  // namespace

// Whether the driver serves this library, without a device or a context: the error, 0 for none. The CUDA versions, as
// 13000 for 13.0, of the driver and of this library.
SIGLIP_EXPORT int32_t siglip_sm90_probe(int32_t versions[2]) {
  int devices;
  cudaDriverGetVersion(&versions[0]);
  cudaRuntimeGetVersion(&versions[1]);
  const cudaError_t error = cudaGetDeviceCount(&devices);
  return error == cudaSuccess && !find_encode() ? cudaErrorNotSupported : error;
}

// Launches on `stream`; the error, 0 for none.
SIGLIP_EXPORT int32_t siglip_sm90_block(const Block* block, void* stream) {
  return launch(*block, static_cast<cudaStream_t>(stream));
}

// How many floats a row of `partials` needs.
SIGLIP_EXPORT int64_t siglip_sm90_partials(int32_t rows, int32_t cols) {
  return int64_t(kPartials) * Tiles(rows, cols).count();
}

// What a program takes of a multiprocessor's shared memory.
SIGLIP_EXPORT int64_t siglip_sm90_shared_bytes() { return kernel_shared_bytes(); }

SIGLIP_EXPORT const char* siglip_sm90_error(int32_t error) {
  switch (error) {
    case kX: return "the driver takes no tensor map of image_features";
    case kY: return "the driver takes no tensor map of text_features";
    case kDz: return "the driver takes no tensor map of dz";
    default: return cudaGetErrorString(cudaError_t(error));
  }
}

}  // namespace siglip::sm90
