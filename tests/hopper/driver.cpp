// The driver's tensor maps: cuTensorMapEncodeTiled, with the rules that its documentation states.

#include <cstddef>

#include "tma.h"

using hopper::TensorMap;

extern "C" __attribute__((visibility("default"))) int cuTensorMapEncodeTiled(
    void* tensor_map, int data_type, uint32_t rank, void* address, const uint64_t* shape, const uint64_t* strides,
    const uint32_t* box, const uint32_t* element_strides, int interleave, int swizzle, int, int fill) {
  constexpr int kInvalid = 1, kFloat16 = 6, kBfloat16 = 9;
  const bool is_half = data_type == kFloat16 || data_type == kBfloat16;
  const uint64_t where = reinterpret_cast<uint64_t>(address);
  if (!is_half || rank != 2 || interleave || fill || swizzle < 0 || swizzle > 3) return kInvalid;
  const uint32_t span = 16u << swizzle;
  if (!where || where % 16 || strides[0] % 16 || strides[0] >= uint64_t(1) << 40) return kInvalid;
  for (int i = 0; i < 2; ++i)
    if (!shape[i] || shape[i] > uint64_t(1) << 32 || !box[i] || box[i] > 256 || element_strides[i] != 1) return kInvalid;
  if (strides[0] < shape[0] * 2 || box[0] * 2 % 16 || (swizzle && box[0] * 2 != span)) return kInvalid;
  *static_cast<TensorMap*>(tensor_map) = {hopper::kTensorMapMagic, where, shape[0], shape[1], strides[0], box[0], box[1], span};
  return 0;
}
