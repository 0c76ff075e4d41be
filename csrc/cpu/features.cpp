// What this processor and its operating system can run.
#include "api.h"

#if defined(__x86_64__)
#include <cpuid.h>

namespace {

// The system saves the tile registers (XCR0 bits 17 and 18).
bool saves_tiles() {
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (ecx & bit_OSXSAVE) == 0) return false;
  __asm__("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return (eax & 0x60000) == 0x60000;
}

bool has_amx_bf16() {
  uint32_t eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 22 & 1) != 0 && saves_tiles();
}

}  // namespace

SIGLIP_API int64_t siglip_features() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  return avx2 * siglip::kAvx2 + avx512 * siglip::kAvx512 + bf16 * siglip::kAvx512Bf16 +
         (avx512 && has_amx_bf16()) * siglip::kAmxBf16;
}
#else
SIGLIP_API int64_t siglip_features() { return 0; }
#endif
