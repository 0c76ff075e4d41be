// What the machine at hand can do.
#pragma once

#include <cstdint>

namespace siglip {

// Each contains those before it.
enum class Level : int32_t { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };

Level best_level();
bool has_float16_products();

}  // namespace siglip
