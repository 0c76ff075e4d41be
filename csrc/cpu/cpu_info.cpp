#include "cpu_info.h"

#if defined(__x86_64__)
#include <cpuid.h>

#include <cstring>
#endif

namespace siglip {

#if defined(__x86_64__)
namespace {

struct CpuidLeaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  explicit CpuidLeaf(unsigned leaf, unsigned subleaf = 0) { __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx); }
};

bool bit(unsigned word, int index) { return word >> index & 1; }
unsigned bits(unsigned word, int index, int count) { return word >> index & ((1u << count) - 1); }

bool has_amx_tile() { return bit(CpuidLeaf(7).edx, 24); }

IsaLevel highest_level() {
  __builtin_cpu_init();  // also checks that the operating system saves the wide registers
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return IsaLevel::kPortable;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return IsaLevel::kAvx2;
  if (!__builtin_cpu_supports("avx512bf16")) return IsaLevel::kAvx512;
  return has_amx_tile() && bit(CpuidLeaf(7).edx, 22) ? IsaLevel::kAmx : IsaLevel::kAvx512Bf16;
}

bool multiplies_float16(IsaLevel level) {
  if (level < IsaLevel::kAvx512) return false;
  return bit(CpuidLeaf(7).edx, 23) || (has_amx_tile() && bit(CpuidLeaf(7, 1).eax, 21));  // AVX512-FP16, AMX-FP16
}

}  // namespace

CpuInfo detect_cpu() {
  CpuInfo info{};
  const CpuidLeaf vendor(0);
  std::memcpy(info.vendor, &vendor.ebx, 4);
  std::memcpy(info.vendor + 4, &vendor.edx, 4);
  std::memcpy(info.vendor + 8, &vendor.ecx, 4);
  const unsigned version = CpuidLeaf(1).eax, family = bits(version, 8, 4);
  info.family = int32_t(family == 15 ? family + bits(version, 20, 8) : family);
  const bool is_extended = family == 6 || family == 15;
  info.model = int32_t(bits(version, 4, 4) + (is_extended ? bits(version, 16, 4) << 4 : 0));
  info.level = highest_level();
  info.float16_products = multiplies_float16(info.level);
  return info;
}
#else
CpuInfo detect_cpu() { return {}; }
#endif

}  // namespace siglip
