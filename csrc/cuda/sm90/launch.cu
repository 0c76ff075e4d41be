// The C interface that siglip_kernels/backends/cuda.py calls through ctypes, so that no torch header or ABI is needed.

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "instantiations.h"
#include "pipeline.h"
#include "tile_scheduler.h"

#define SIGLIP_EXPORT extern "C" __attribute__((visibility("default")))

namespace siglip::sm90 {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// Looked up at run time, because the library must load on machines without a driver.
EncodeTiled find_encode_tiled() {
  void* entry_point = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry_point, 12000, cudaEnableDefault, &result);
#else
  cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry_point, cudaEnableDefault, &result);
#endif
  return reinterpret_cast<EncodeTiled>(entry_point);
}

// Errors of the launcher itself: the driver refused this operand's tensor map. Negative, unlike any cudaError_t.
enum LaunchError : int32_t { kNoTensorMapX = -1, kNoTensorMapY = -2, kNoTensorMapDz = -3 };

// Tensor map of a [rows, cols] matrix, in swizzled boxes of [box_rows, 64]; loads out of bounds give 0.
bool encode_tensor_map(EncodeTiled encode_tiled, CUtensorMap* tensor_map, Dtype dtype, const void* data, int64_t rows,
                       int64_t cols, int64_t stride, int box_rows) {
  const auto type = dtype == Dtype::kBfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t shape[] = {cuuint64_t(cols), cuuint64_t(rows)}, strides[] = {cuuint64_t(stride) * 2};
  const cuuint32_t box[] = {64, cuuint32_t(box_rows)}, element_strides[] = {1, 1};
  return encode_tiled(tensor_map, type, 2, const_cast<void*>(data), shape, strides, box, element_strides,
                      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

int32_t launch(const BlockParams& params, cudaStream_t stream) {
  static const EncodeTiled encode_tiled = find_encode_tiled();
  if (!encode_tiled || (params.float32_dz && kClusterSize > 1)) return cudaErrorNotSupported;
  int num_sms;
  CUtensorMap x_map, y_map, dz_map{};
  cudaError_t error = cudaSetDevice(params.device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, params.device);
  if (error != cudaSuccess) return error;
  if (!encode_tensor_map(encode_tiled, &x_map, params.dtype, params.x, params.rows, params.features, params.x_stride,
                         kBlockM))
    return kNoTensorMapX;
  if (!encode_tensor_map(encode_tiled, &y_map, params.dtype, params.y, params.cols, params.features, params.y_stride,
                         kBlockN / kClusterSize))
    return kNoTensorMapY;
  if (params.dz && !params.float32_dz &&
      !encode_tensor_map(encode_tiled, &dz_map, params.dtype, params.dz, params.rows, params.cols,
                                      params.dz_stride, kConsumerRows))
    return kNoTensorMapDz;
  const void* const kernel =
      params.dtype == Dtype::kBfloat16 ? select_bfloat16_kernel(params) : select_float16_kernel(params);
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes());
  if (error != cudaSuccess) return error;
  const int num_clusters = std::min(std::max(num_sms / kClusterSize, 1), TileScheduler(params.rows, params.cols).num_tiles());
  void* args[] = {const_cast<BlockParams*>(&params), &x_map, &y_map, &dz_map};
  return cudaLaunchKernel(kernel, num_clusters * kClusterSize, threads_per_block(), args, smem_bytes(), stream);
}

}  // namespace

// Whether the driver can run this library, asked without a device or a context: a cudaError_t, 0 if it can. `versions`
// receives the CUDA versions of the driver and of this library, 13.0 as 13000.
SIGLIP_EXPORT int32_t siglip_sm90_probe(int32_t versions[2]) {
  int num_devices;
  cudaDriverGetVersion(&versions[0]);
  cudaRuntimeGetVersion(&versions[1]);
  const cudaError_t error = cudaGetDeviceCount(&num_devices);
  return error == cudaSuccess && !find_encode_tiled() ? cudaErrorNotSupported : error;
}

// Launches on `stream`. Returns an error for siglip_sm90_error, or 0.
SIGLIP_EXPORT int32_t siglip_sm90_block(const BlockParams* params, void* stream) {
  return launch(*params, static_cast<cudaStream_t>(stream));
}

// Floats in one row of `partials`.
SIGLIP_EXPORT int64_t siglip_sm90_partials(int32_t rows, int32_t cols) {
  return num_partials(rows, cols);
}

// Dynamic shared memory of a thread block.
SIGLIP_EXPORT int64_t siglip_sm90_shared_bytes() { return smem_bytes(); }

SIGLIP_EXPORT const char* siglip_sm90_error(int32_t error) {
  switch (error) {
    case kNoTensorMapX: return "the driver takes no tensor map of image_features";
    case kNoTensorMapY: return "the driver takes no tensor map of text_features";
    case kNoTensorMapDz: return "the driver takes no tensor map of dz";
    default: return cudaGetErrorString(cudaError_t(error));
  }
}

}  // namespace siglip::sm90
