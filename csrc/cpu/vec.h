// Vectors as wide as the level that this file is compiled for, and exp and log1p over them to 2 ulp.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace siglip {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

typedef float FloatVec __attribute__((vector_size(kBytes)));
typedef double DoubleVec __attribute__((vector_size(kBytes)));
typedef int32_t Int32Vec __attribute__((vector_size(kBytes)));
typedef int64_t Int64Vec __attribute__((vector_size(kBytes)));

template <class T>
struct Lane;
template <>
struct Lane<float> {
  using Vec = FloatVec;
  using Int = Int32Vec;
  static constexpr int kMantissa = 23, kBias = 127, kExpTerms = 8, kLogTerms = 6;
  // ln 2 in two parts: n times the first is exact for every exponent n.
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kSmallest = -105.0f;         // exp of less is 0
  static constexpr float kRound = 12582912.0f;        // 1.5 · 2^23: adding it rounds to an integer
  static constexpr int32_t kSqrtHalf = 0x3f3504f3;    // the bits of √½
};
template <>
struct Lane<double> {
  using Vec = DoubleVec;
  using Int = Int64Vec;
  static constexpr int kMantissa = 52, kBias = 1023, kExpTerms = 14, kLogTerms = 12;
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kSmallest = -747.0;
  static constexpr double kRound = 6755399441055744.0;
  static constexpr int64_t kSqrtHalf = 0x3fe6a09e667f3bcd;
};

template <class T>
using Vec = typename Lane<T>::Vec;
template <class T>
constexpr int kWidth = kBytes / sizeof(T);

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

template <class T>
inline Vec<T> splat(T value) {
  return Vec<T>{} + value;
}

template <class To, class From>
inline To bits(From v) {
  To to;
  static_assert(sizeof to == sizeof v);
  std::memcpy(&to, &v, sizeof to);
  return to;
}

// 2^n for integers n whose power is a normal number.
template <class T>
inline Vec<T> power_of_two(typename Lane<T>::Int n) {
  return bits<Vec<T>>((n + Lane<T>::kBias) << Lane<T>::kMantissa);
}

// Σ 1/k! r^k on |r| <= ln(2)/2, times 2^n in two factors, so that subnormal results come out right.
template <class T>
inline Vec<T> exp_nonpositive(Vec<T> x) {
  using L = Lane<T>;
  using Int = typename L::Int;
  x = x < L::kSmallest ? splat<T>(L::kSmallest) : x;  // keeps NaN
  const Vec<T> shifted = x * static_cast<T>(1.44269504088896340736) + L::kRound;
  const Vec<T> n = shifted - L::kRound;
  const Vec<T> r = (x - n * L::kLn2High) - n * L::kLn2Low;
  T factorial[L::kExpTerms];
  factorial[0] = 1;
  for (int k = 1; k < L::kExpTerms; ++k) factorial[k] = factorial[k - 1] * static_cast<T>(k);
  Vec<T> p = splat<T>(1 / factorial[L::kExpTerms - 1]);
  for (int k = L::kExpTerms - 2; k >= 0; --k) p = p * r + 1 / factorial[k];
  // The low bits of `shifted` are n.
  const Int exponent = bits<Int>(shifted) - bits<Int>(splat<T>(L::kRound));
  const Int half = exponent >> 1;
  return p * power_of_two<T>(half) * power_of_two<T>(exponent - half);
}

// log(1 + p) of p >= 0: 2 atanh(s) of the fraction, where 1 + p = 2^n (1 + f), with the rounding of 1 + p made good.
template <class T>
inline Vec<T> log1p_nonnegative(Vec<T> p) {
  using L = Lane<T>;
  using Int = typename L::Int;
  const Vec<T> w = 1 + p;
  const Int above = bits<Int>(w) - L::kSqrtHalf;
  const Int n = above >> L::kMantissa;
  const Vec<T> fraction = bits<Vec<T>>(bits<Int>(w) - (n << L::kMantissa));
  const Vec<T> f = n == 0 ? p : fraction - 1;  // where nothing was scaled p itself is exact
  const Vec<T> lost = n == 0 ? Vec<T>{} : (p - (w - 1)) / w;
  const Vec<T> s = f / (2 + f), s2 = s * s;
  Vec<T> series = splat<T>(static_cast<T>(1) / (2 * L::kLogTerms - 1));
  for (int k = L::kLogTerms - 2; k >= 1; --k) series = series * s2 + static_cast<T>(1) / (2 * k + 1);
  const Vec<T> log_fraction = f - s * (f - 2 * s2 * series);  // = 2 s (1 + s² series) without rounding 2 s
  const Vec<T> exponent = __builtin_convertvector(n, Vec<T>);
  const Vec<T> log = exponent * L::kLn2High + (log_fraction + (exponent * L::kLn2Low + lost));
  return p < std::numeric_limits<T>::infinity() ? log : p;  // infinity and NaN stay
}

}  // namespace
}  // namespace siglip
