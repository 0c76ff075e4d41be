// Which CPU this is, and which instruction sets it has.
#pragma once

#include <cstdint>

namespace siglip {

// Each level includes those before it.
enum class IsaLevel : int32_t { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// siglip_kernels/backends/cpu_native.py reads it: keep both in the same order.
struct CpuInfo {
  char vendor[16];  // CPUID's twelve letters, padded with zeros; empty without CPUID
  int32_t family, model;
  IsaLevel level;            // the highest
  int32_t float16_products;  // whether it multiplies float16 natively, by AVX512-FP16 or AMX-FP16
};

CpuInfo detect_cpu();

}  // namespace siglip
