// The arithmetic of the sigmoid loss on one thread's inner products. Compiles for the host too, where it is held to
// float64.
//
// With a = -s·z and e = exp(-|a|):  softplus(a) = max(a, 0) + log1p(e),  σ(a) = (a < 0 ? e : 1) / (1 + e).
// The log1p of many pairs costs one: Π(1 + e) - 1 is carried as p ← p + e + p·e. Folding log2(e) into scale and bias
// would save a product, but its rounding is the same for every pair: at z = -10 it shifts σ by 5e-7.
#pragma once

#include <math.h>

#include "host_device.h"

namespace siglip::sm90 {

// The special-function unit, which flushes subnormal numbers to 0; on the host its exact values.
SIGLIP_HOST_DEVICE float exp2_approx(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
#endif
}
SIGLIP_HOST_DEVICE float reciprocal_approx(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1 / x;
#endif
}

constexpr float kLog2E = 1.4426950408889634f;
// Where all pairs at hand have a below, e < 0.0184: σ is e·(1 - e + e² - e³) to 1.2e-7, and no maximum is needed.
constexpr float kUniformBelow = -4.0f;
// Factors 1 + e <= 2 that one product may gather.
constexpr int kMostFactors = 64;

// Of a thread's pairs, until they are flushed.
struct Sums {
  float loss = 0, dz_u = 0, dz = 0;
  float product = 0;  // Π(1 + e) - 1 of at most kMostFactors pairs

  SIGLIP_HOST_DEVICE void flush() {
    loss += log1pf(product);  // lg2.approx errs by 2^-22 near 1, where the product is at first
    product = 0;
  }
};

// Whether every a lies below kUniformBelow; never with a NaN.
template <int kCount>
SIGLIP_HOST_DEVICE bool all_low(const float (&a)[kCount]) {
  bool low = true;
  for (int i = 0; i < kCount; ++i) low &= a[i] < kUniformBelow;
  return low;
}

// σ(a) of kCount pairs, and their part of `sums`; kLow: all_low(a).
template <bool kLow, bool kLossOnly, int kCount>
SIGLIP_HOST_DEVICE void pairs(const float (&a)[kCount], float (&sigmoid)[kCount], Sums& sums) {
  SIGLIP_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const float e = exp2_approx((kLow ? a[i] : -fabsf(a[i])) * kLog2E);
    sums.product = fmaf(sums.product, e, e) + sums.product;
    if (!kLow) sums.loss += fmaxf(a[i], 0);
    if (kLossOnly) continue;
    if (kLow)
      sigmoid[i] = e * fmaf(-e, fmaf(-e, 1 - e, 1), 1);
    else
      sigmoid[i] = (a[i] < 0 ? e : 1) * reciprocal_approx(1 + e);
  }
}

// The same where each pair has a weight: sigmoid is weighted too.
template <bool kLossOnly, int kCount>
SIGLIP_HOST_DEVICE void weighted_pairs(const float (&a)[kCount], const float (&weight)[kCount],
                                       float (&sigmoid)[kCount], Sums& sums) {
  SIGLIP_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const float e = exp2_approx(-fabsf(a[i]) * kLog2E);
    sums.loss = fmaf(weight[i], fmaxf(a[i], 0) + log1pf(e), sums.loss);
    if (!kLossOnly) sigmoid[i] = weight[i] * (a[i] < 0 ? e : 1) * reciprocal_approx(1 + e);
  }
}

}  // namespace siglip::sm90
