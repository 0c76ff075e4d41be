// The sigmoid loss of one thread's logits. Compiles for the host too, where it is tested against float64.
//
// With a = -s·z:  softplus(a) = log1p(e),  σ(a) = e / (1 + e) with e = exp(a), as long as a is low. For any a, with
// e = exp(-|a|):  softplus(a) = max(a, 0) + log1p(e),  σ(a) = (a < 0 ? e : 1) / (1 + e).
// Many pairs share one log1p: p = Π(1 + e) - 1 is accumulated as p ← p + e + p·e. Folding log2(e) into scale and bias
// would save a multiplication, but every pair would get the same rounding error: at z = -10 it shifts σ by 5e-7.
#pragma once

#include "host_device.h"

namespace siglip::sm90 {

// The special function unit's, which flushes subnormal numbers to 0; on the host the exact value.
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
SIGLIP_HOST_DEVICE float rcp_approx(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1 / x;
#endif
}

constexpr float kLog2E = 1.4426950408889634f;
// Factors 1 + e in one product, which must not overflow: 13.2^32 < 2^120 if every a is low, at most this.
constexpr int kMaxFactors = 32;
constexpr float kLow = 2.5f;

// A thread's partial sums.
struct Sums {
  float loss = 0, dz_u = 0, dz = 0;
  float product = 0;  // Π(1 + e) - 1 of at most kMaxFactors pairs

  SIGLIP_HOST_DEVICE void flush() {
    loss += log1pf(product);  // not lg2.approx, which is off by 2^-22 near 1, where the product starts
    product = 0;
  }
};

// Whether every a is low, or NaN, which either form passes on.
template <int kCount>
SIGLIP_HOST_DEVICE bool all_low(const float (&a)[kCount]) {
  static_assert(kCount % 4 == 0, "four chains of maxima, for they wait for each other");
  float largest[4] = {a[0], a[1], a[2], a[3]};
  SIGLIP_UNROLL
  for (int i = 4; i < kCount; ++i) largest[i % 4] = fmaxf(largest[i % 4], a[i]);
  return !(fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3])) > kLow);
}

// Computes σ(a) of kCount pairs and adds their losses to `sums`. kAllLow requires all_low(a).
template <bool kAllLow, bool kLossOnly, int kCount>
SIGLIP_HOST_DEVICE void accumulate_pairs(const float (&a)[kCount], float (&sigmoid)[kCount], Sums& sums) {
  SIGLIP_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const float e = exp2_approx((kAllLow ? a[i] : -fabsf(a[i])) * kLog2E);
    sums.product = fmaf(sums.product, e, e) + sums.product;
    if (!kAllLow) sums.loss += fmaxf(a[i], 0);
    if (!kLossOnly) sigmoid[i] = (kAllLow || a[i] < 0 ? e : 1) * rcp_approx(1 + e);
  }
}

// log1p(e) to 1.4e-7 of itself, for e in [0, 1]: a minimax polynomial. log1pf takes twice the instructions.
SIGLIP_HOST_DEVICE float log1p_unit(float e) {
  float q = 0.0053648227f;
  q = fmaf(q, e, -0.030065786f);
  q = fmaf(q, e, 0.079204522f);
  q = fmaf(q, e, -0.13753802f);
  q = fmaf(q, e, 0.19153655f);
  q = fmaf(q, e, -0.24857163f);
  q = fmaf(q, e, 0.33321324f);
  q = fmaf(q, e, -0.49999648f);
  return fmaf(e * e, q, e);
}

// Adds weight · (mass · softplus(a) + opposite · softplus(-a)) to `sums` and returns its derivative by a. Mass and
// opposite are 1 and 0 but with masses, a positive_weight or a label_smoothing.
template <bool kLossOnly>
SIGLIP_HOST_DEVICE float accumulate_weighted_pair(float a, float weight, float mass, float opposite, Sums& sums) {
  const float e = exp2_approx(-fabsf(a) * kLog2E);
  // Of 0 times infinity nothing is left.
  const float hinges = mass * fmaxf(a, 0) + (opposite == 0 ? 0 : opposite * fmaxf(-a, 0));
  sums.loss = fmaf(weight, fmaf(mass + opposite, log1p_unit(e), hinges), sums.loss);
  if (kLossOnly) return 0;
  const float parts = mass * (a < 0 ? e : 1) - opposite * (a < 0 ? 1 : e);
  return weight * parts * rcp_approx(1 + e);
}

}  // namespace siglip::sm90
