#include "machine.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace siglip {

#if defined(__x86_64__)
namespace {

struct Leaf7 {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  explicit Leaf7(unsigned subleaf) { __get_cpuid_count(7, subleaf, &eax, &ebx, &ecx, &edx); }
};

bool bit(unsigned word, int index) { return word >> index & 1; }

bool has_amx_tiles() { return bit(Leaf7(0).edx, 24); }

}  // namespace

Level best_level() {
  __builtin_cpu_init();  // it also asks whether the operating system saves the wide registers
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Level::kPortable;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return Level::kAvx2;
  if (!__builtin_cpu_supports("avx512bf16")) return Level::kAvx512;
  return has_amx_tiles() && bit(Leaf7(0).edx, 22) ? Level::kAmx : Level::kAvx512Bf16;
}

bool has_float16_products() {
  if (best_level() < Level::kAvx512) return false;
  return bit(Leaf7(0).edx, 23) || (has_amx_tiles() && bit(Leaf7(1).eax, 21));  // AVX512-FP16, AMX-FP16
}
#else
Level best_level() { return Level::kPortable; }
bool has_float16_products() { return false; }
#endif

}  // namespace siglip
