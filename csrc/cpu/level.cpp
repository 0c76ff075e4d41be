// Compiled once for each instruction set, with its flags and SIGLIP_LEVEL as its name.
#include "epilogue.h"

#define SIGLIP_JOIN2(a, b) a##b
#define SIGLIP_JOIN(a, b) SIGLIP_JOIN2(a, b)
#define SIGLIP_NAME(name) SIGLIP_JOIN(name, SIGLIP_LEVEL)

// The epilogue over inner products that the library formed.
SIGLIP_API void SIGLIP_NAME(siglip_epilogue_)(const siglip::Block* block) {
  using namespace siglip;
  switch (block->dz_element) {
    case kFloat32: return epilogue<float, float>(*block);
    case kFloat64: return epilogue<double, double>(*block);
    case kBFloat16: return epilogue<float, uint16_t>(*block);
  }
}

namespace {

template <class T, class Function>
void map(const T* in, T* out, int64_t n, const Function& function) {
  constexpr int64_t W = siglip::kWidth<T>;
  for (int64_t i = 0; i < n; i += W) {
    T buffer[W] = {};
    const size_t bytes = sizeof(T) * static_cast<size_t>(n - i < W ? n - i : W);
    std::memcpy(buffer, in + i, bytes);
    siglip::store(buffer, function(siglip::load(buffer)));
    std::memcpy(out + i, buffer, bytes);
  }
}

}  // namespace

// For tests: exp of n numbers <= 0, log1p of n numbers >= 0.
SIGLIP_API void SIGLIP_NAME(siglip_exp_float_)(const float* in, float* out, int64_t n) {
  map(in, out, n, [](siglip::FloatVec v) { return siglip::exp_nonpositive<float>(v); });
}
SIGLIP_API void SIGLIP_NAME(siglip_exp_double_)(const double* in, double* out, int64_t n) {
  map(in, out, n, [](siglip::DoubleVec v) { return siglip::exp_nonpositive<double>(v); });
}
SIGLIP_API void SIGLIP_NAME(siglip_log1p_float_)(const float* in, float* out, int64_t n) {
  map(in, out, n, [](siglip::FloatVec v) { return siglip::log1p_nonnegative<float>(v); });
}
SIGLIP_API void SIGLIP_NAME(siglip_log1p_double_)(const double* in, double* out, int64_t n) {
  map(in, out, n, [](siglip::DoubleVec v) { return siglip::log1p_nonnegative<double>(v); });
}
