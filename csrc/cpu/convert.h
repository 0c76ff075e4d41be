// float32 to the operands' dtypes, to nearest even.
#pragma once

#include "vectors.h"

namespace siglip::SIGLIP_LEVEL {

using Floats = Vector<float>;
using Words = Vector<int32_t>;
using Halves = Vector<int16_t, SIGLIP_VECTOR_BYTES / 2>;

SIGLIP_INLINE Halves to_bfloat16(Floats x) {
  const Words bits = bits_as<Words>(x);
  const Words rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const Words word = x == x ? rounded : Words{} + 0x7fc00000;
  return __builtin_convertvector(word >> 16, Halves);
}

SIGLIP_INLINE Halves to_float16(Floats x) {
  const Words all = bits_as<Words>(x), bits = all & 0x7fffffff, sign = (all >> 16) & 0x8000;
  const Words normal = (bits - (112 << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  // 0.5 has float16's subnormal spacing as its own unit in the last place: adding it rounds.
  const Words subnormal = bits_as<Words>(bits_as<Floats>(bits) + 0.5f) - (126 << 23);
  Words word = bits < (113 << 23) ? subnormal : normal;
  word = bits >= 0x477ff000 ? Words{} + 0x7c00 : word;  // from 65520 on: inf
  word = bits > 0x7f800000 ? Words{} + 0x7e00 : word;
  return __builtin_convertvector(word | sign, Halves);
}

}  // namespace siglip::SIGLIP_LEVEL
