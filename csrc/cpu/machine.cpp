#include "machine.h"

#if defined(__x86_64__)
#include <cpuid.h>

#include <cstring>
#endif

namespace siglip {

#if defined(__x86_64__)
namespace {

struct Leaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  explicit Leaf(unsigned leaf, unsigned subleaf = 0) { __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx); }
};

bool bit(unsigned word, int index) { return word >> index & 1; }
unsigned bits(unsigned word, int index, int count) { return word >> index & ((1u << count) - 1); }

bool has_amx_tiles() { return bit(Leaf(7).edx, 24); }

Level best_level() {
  __builtin_cpu_init();  // it also asks whether the operating system saves the wide registers
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Level::kPortable;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return Level::kAvx2;
  if (!__builtin_cpu_supports("avx512bf16")) return Level::kAvx512;
  return has_amx_tiles() && bit(Leaf(7).edx, 22) ? Level::kAmx : Level::kAvx512Bf16;
}

bool has_float16_products(Level level) {
  if (level < Level::kAvx512) return false;
  return bit(Leaf(7).edx, 23) || (has_amx_tiles() && bit(Leaf(7, 1).eax, 21));  // AVX512-FP16, AMX-FP16
}

}  // namespace

Machine this_machine() {
  Machine machine{};
  const Leaf name(0);
  std::memcpy(machine.vendor, &name.ebx, 4);
  std::memcpy(machine.vendor + 4, &name.edx, 4);
  std::memcpy(machine.vendor + 8, &name.ecx, 4);
  const unsigned version = Leaf(1).eax, family = bits(version, 8, 4);
  machine.family = int32_t(family == 15 ? family + bits(version, 20, 8) : family);
  const bool is_extended = family == 6 || family == 15;
  machine.model = int32_t(bits(version, 4, 4) + (is_extended ? bits(version, 16, 4) << 4 : 0));
  machine.level = best_level();
  machine.float16_products = has_float16_products(machine.level);
  return machine;
}
#else
Machine this_machine() { return {}; }
#endif

}  // namespace siglip
