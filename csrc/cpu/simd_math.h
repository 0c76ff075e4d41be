// exp and log1p on the ranges that softplus and sigmoid need, to 2 ulp in float32 and float64.
#pragma once

#include "simd.h"

namespace siglip::SIGLIP_ISA_LEVEL {

template <class T>
SIGLIP_INLINE Vector<T> negative_abs(Vector<T> x) {
  using Ints = Vector<Int<T>>;
  return bit_cast<Vector<T>>(bit_cast<Ints>(x) | bit_cast<Ints>(broadcast(T(-0.0))));
}

// exp(x) for x in [-inf, 0], with subnormal results; NaN stays NaN.
template <class T>
SIGLIP_INLINE Vector<T> exp_nonpositive(Vector<T> x) {
  using F = FloatTraits<T>;
  using Ints = Vector<Int<T>>;
  constexpr int kGuard = 64;  // the power of two is computed 2^64 too large, so that it is never subnormal
  // Adding it rounds to an integer in the low bits.
  constexpr T kRoundingShift = T(3) * T(Int<T>(1) << (F::kMantissaBits - 1));
  x = x < F::kExpUnderflow ? broadcast(F::kExpUnderflow) : x;
  const Vector<T> shifted = x * T(0x1.71547652b82fep0) + kRoundingShift;
  const Vector<T> k = shifted - kRoundingShift;
  const Vector<T> r = x - k * F::kLn2High - k * F::kLn2Low;

  constexpr T kUnguard = T(1) / T(UINT64_C(1) << 63) / 2;
  T coefficients[F::kExpTerms + 1] = {kUnguard};
  for (int n = 1; n <= F::kExpTerms; ++n) coefficients[n] = coefficients[n - 1] / n;
  Vector<T> sum = broadcast(coefficients[F::kExpTerms]);
  for (int n = F::kExpTerms - 1; n >= 0; --n) sum = sum * r + coefficients[n];

  const Ints power = (bit_cast<Ints>(shifted) + (F::kExponentBias + kGuard)) << F::kMantissaBits;
  return sum * bit_cast<Vector<T>>(power);
}

// log(1 + p) for p in [0, 2^100] and inf; NaN stays NaN.
template <class T>
SIGLIP_INLINE Vector<T> log1p_nonnegative(Vector<T> p) {
  using F = FloatTraits<T>;
  using Ints = Vector<Int<T>>;
  constexpr Int<T> kThreeQuarters = (Int<T>(2 * F::kExponentBias - 1) << (F::kMantissaBits - 1));  // bits of 0.75
  const Vector<T> w = 1 + p;
  const Vector<T> rounding_error = p < 1 ? p - (w - 1) : 1 - (w - p);
  // w = m·2^k with m in [0.75, 1.5)
  const Ints k = (bit_cast<Ints>(w) - kThreeQuarters) >> F::kMantissaBits;
  const Vector<T> m = bit_cast<Vector<T>>(bit_cast<Ints>(w) - (k << F::kMantissaBits));
  const Vector<T> f = (m - 1) + rounding_error * bit_cast<Vector<T>>((F::kExponentBias - k) << F::kMantissaBits);
  // log(1 + f) = 2·atanh(s) = f - s·(f - 2·(s²/3 + s⁴/5 + …))
  const Vector<T> s = f / (2 + f), s2 = s * s;
  Vector<T> tail = broadcast(T(0));
  for (int n = F::kLogTerms; n >= 1; --n) tail = (tail + T(2) / (2 * n + 1)) * s2;
  const Vector<T> exponent = __builtin_convertvector(k, Vector<T>);
  const Vector<T> log = exponent * F::kLn2High + (f - (s * (f - tail) - exponent * F::kLn2Low));
  return p < T(__builtin_inf()) ? log : p + p;
}

}  // namespace siglip::SIGLIP_ISA_LEVEL
