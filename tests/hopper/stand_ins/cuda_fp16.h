// Stands in for CUDA's header.
#pragma once

#include "ptx_arithmetic.h"

struct __half2 {
  uint16_t x, y;
};

inline __half2 __floats2half2_rn(float low, float high) {
  return {hopper::bits_of_f16(low), hopper::bits_of_f16(high)};
}
