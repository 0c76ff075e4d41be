// Conversion of float32 to the operands' dtypes, rounded to nearest even.
#pragma once

#include "simd.h"

namespace siglip::SIGLIP_ISA_LEVEL {

using Floats = Vector<float>;
using Ints = Vector<int32_t>;
using Halves = Vector<int16_t, SIGLIP_VECTOR_BYTES / 2>;

SIGLIP_INLINE Halves to_bfloat16(Floats x) {
  const Ints bits = bit_cast<Ints>(x);
  const Ints rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const Ints word = x == x ? rounded : Ints{} + 0x7fc00000;
  return __builtin_convertvector(word >> 16, Halves);
}

SIGLIP_INLINE Halves to_float16(Floats x) {
  const Ints raw = bit_cast<Ints>(x), bits = raw & 0x7fffffff, sign = (raw >> 16) & 0x8000;
  const Ints normal = (bits - (112 << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  // Adding 0.5 rounds, because its ulp in float32 is the spacing of float16's subnormals.
  const Ints subnormal = bit_cast<Ints>(bit_cast<Floats>(bits) + 0.5f) - (126 << 23);
  Ints word = bits < (113 << 23) ? subnormal : normal;
  word = bits >= 0x477ff000 ? Ints{} + 0x7c00 : word;  // 65520 and above round to inf
  word = bits > 0x7f800000 ? Ints{} + 0x7e00 : word;
  return __builtin_convertvector(word | sign, Halves);
}

}  // namespace siglip::SIGLIP_ISA_LEVEL
