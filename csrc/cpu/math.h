// exp and log1p where softplus and the sigmoid need them, within 2 units in the last place, in float32 and float64.
#pragma once

#include "vectors.h"

namespace siglip::SIGLIP_LEVEL {

template <class T>
SIGLIP_INLINE Vector<T> minus_magnitude(Vector<T> x) {
  using Ints = Vector<Int<T>>;
  return bits_as<Vector<T>>(bits_as<Ints>(x) | bits_as<Ints>(broadcast(T(-0.0))));
}

// exp(x) for x in [-inf, 0], subnormal results included; NaN stays.
template <class T>
SIGLIP_INLINE Vector<T> exp_of_nonpositive(Vector<T> x) {
  using F = Format<T>;
  using Ints = Vector<Int<T>>;
  constexpr int kGuard = 64;  // the power of two is formed 2^64 too large, so that it is never subnormal itself
  constexpr T kShift = T(3) * T(Int<T>(1) << (F::kMantissa - 1));  // adding it rounds to an integer, in the low bits
  x = x < F::kExpIsZero ? broadcast(F::kExpIsZero) : x;
  const Vector<T> shifted = x * T(0x1.71547652b82fep0) + kShift;
  const Vector<T> k = shifted - kShift;
  const Vector<T> r = x - k * F::kLn2High - k * F::kLn2Low;

  constexpr T kUnguard = T(1) / T(UINT64_C(1) << 63) / 2;
  T coefficients[F::kExpTerms + 1] = {kUnguard};
  for (int n = 1; n <= F::kExpTerms; ++n) coefficients[n] = coefficients[n - 1] / n;
  Vector<T> sum = broadcast(coefficients[F::kExpTerms]);
  for (int n = F::kExpTerms - 1; n >= 0; --n) sum = sum * r + coefficients[n];

  const Ints power = (bits_as<Ints>(shifted) + (F::kBias + kGuard)) << F::kMantissa;
  return sum * bits_as<Vector<T>>(power);
}

// log(1 + p) for p in [0, 2^100], and for inf; NaN stays.
template <class T>
SIGLIP_INLINE Vector<T> log1p_of_nonnegative(Vector<T> p) {
  using F = Format<T>;
  using Ints = Vector<Int<T>>;
  constexpr Int<T> kThreeQuarters = (Int<T>(2 * F::kBias - 1) << (F::kMantissa - 1));  // bits of 0.75
  const Vector<T> w = 1 + p;
  const Vector<T> lost = p < 1 ? p - (w - 1) : 1 - (w - p);
  // w = m·2^k with m in [0.75, 1.5)
  const Ints k = (bits_as<Ints>(w) - kThreeQuarters) >> F::kMantissa;
  const Vector<T> m = bits_as<Vector<T>>(bits_as<Ints>(w) - (k << F::kMantissa));
  const Vector<T> f = (m - 1) + lost * bits_as<Vector<T>>((F::kBias - k) << F::kMantissa);
  // log(1 + f) = 2·atanh(s) = f - s·(f - 2·(s²/3 + s⁴/5 + …))
  const Vector<T> s = f / (2 + f), s2 = s * s;
  Vector<T> tail = broadcast(T(0));
  for (int n = F::kLogTerms; n >= 1; --n) tail = (tail + T(2) / (2 * n + 1)) * s2;
  const Vector<T> exponent = __builtin_convertvector(k, Vector<T>);
  const Vector<T> log = exponent * F::kLn2High + (f - (s * (f - tail) - exponent * F::kLn2Low));
  return p < T(__builtin_inf()) ? log : p + p;
}

}  // namespace siglip::SIGLIP_LEVEL
