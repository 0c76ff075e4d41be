// Stands in for CUDA's header.
#pragma once

#include "ptx_arithmetic.h"

struct __nv_bfloat162 {
  uint16_t x, y;
};

inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return {hopper::bits_of_bf16(low), hopper::bits_of_bf16(high)};
}
