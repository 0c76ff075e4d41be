// What the machine at hand is, and what it can do.
#pragma once

#include <cstdint>

namespace siglip {

// Each contains those before it.
enum class Level : int32_t { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// As siglip_kernels/backends/cpu_native.py reads it: keep the two alike.
struct Machine {
  char vendor[16];  // CPUID's twelve letters, zeros after them; empty where there is no CPUID
  int32_t family, model;
  Level level;               // the best
  int32_t float16_products;  // whether they run in the machine's own instructions
};

Machine this_machine();

}  // namespace siglip
