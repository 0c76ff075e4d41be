// Stands in for libcuda.so.1: cuTensorMapEncodeTiled, with the rules that its documentation states, and launches.

#include <cstddef>

#include "machine.h"

using hopper::TensorMap;

extern "C" int cuTensorMapEncodeTiled(
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

// ---- launches: ours, and Triton's with what it asks of a device besides ----

namespace {

struct LaunchConfig {  // CUlaunchConfig, as far as it is read
  uint32_t grid[3], block[3], shared_bytes;
};

constexpr int kLaunchFailed = 719;
// Where the dynamic shared memory of our CUDA kernel begins: 16-byte aligned and no better, as CUDA promises.
constexpr uint32_t kMisalignment = 272;

int launch(void* function, uint32_t grid, uint32_t threads, uint32_t shared_bytes, uint32_t misalignment, void** arguments) {
  const auto body = reinterpret_cast<hopper::Body>(function);
  return hopper_launch(body, grid, threads, shared_bytes, misalignment, arguments) ? kLaunchFailed : 0;
}

}  // namespace

extern "C" {

int cuLaunchKernelEx(const LaunchConfig* config, void* function, void** arguments, void**) {
  return launch(function, config->grid[0], config->block[0], config->shared_bytes, 0, arguments);
}
int cuLaunchKernel(void* function, uint32_t grid, uint32_t, uint32_t, uint32_t threads, uint32_t, uint32_t,
                   uint32_t shared_bytes, void*, void** arguments, void**) {
  return launch(function, grid, threads, shared_bytes, kMisalignment, arguments);
}
int cuGetErrorString(int, const char** text) { return *text = hopper_error(), 0; }
// Below 13.2 Triton changes a bit of the tensor maps of small tensors, in the layout of the real driver.
int cuDriverGetVersion(int* version) { return *version = 13020, 0; }
int cuCtxGetCurrent(void** context) { return *context = context, 0; }
int cuPointerGetAttribute(uint64_t* data, int, uint64_t pointer) { return *data = pointer, 0; }

// Linked, and not called.
#define HOPPER_UNUSED(name) \
  int name() { return kLaunchFailed; }
HOPPER_UNUSED(cuCtxGetLimit)
HOPPER_UNUSED(cuCtxSetCurrent)
HOPPER_UNUSED(cuCtxSetLimit)
HOPPER_UNUSED(cuDeviceGet)
HOPPER_UNUSED(cuDeviceGetAttribute)
HOPPER_UNUSED(cuDevicePrimaryCtxRetain)
HOPPER_UNUSED(cuFuncGetAttribute)
HOPPER_UNUSED(cuFuncSetAttribute)
HOPPER_UNUSED(cuFuncSetCacheConfig)
HOPPER_UNUSED(cuModuleGetFunction)
HOPPER_UNUSED(cuModuleLoadData)
HOPPER_UNUSED(cuOccupancyMaxActiveClusters)
}
