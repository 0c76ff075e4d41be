// SIMD vectors of the instruction set that a file is compiled for, by the compilers' vector extension. Everything is in
// the namespace SIGLIP_ISA_LEVEL, so that the linker cannot replace code of one level with that of another.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define SIGLIP_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define SIGLIP_VECTOR_BYTES 32
#else
#define SIGLIP_VECTOR_BYTES 16
#endif

#define SIGLIP_INLINE [[gnu::always_inline]] inline

namespace siglip::SIGLIP_ISA_LEVEL {

template <class T, int kBytes = SIGLIP_VECTOR_BYTES>
struct VectorOf {
  typedef T Type __attribute__((vector_size(kBytes)));
};
template <class T, int kBytes = SIGLIP_VECTOR_BYTES>
using Vector = typename VectorOf<T, kBytes>::Type;

template <class T>
constexpr int kLanes = SIGLIP_VECTOR_BYTES / sizeof(T);

template <class T>
struct FloatTraits;
template <>
struct FloatTraits<float> {
  using Int = int32_t;
  static constexpr int kMantissaBits = 23, kExponentBias = 127;
  static constexpr float kExpUnderflow = -104;  // below this exp rounds to 0
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cf79abc9e3bp-20f;
  static constexpr int kExpTerms = 7, kLogTerms = 5;
};
template <>
struct FloatTraits<double> {
  using Int = int64_t;
  static constexpr int kMantissaBits = 52, kExponentBias = 1023;
  static constexpr double kExpUnderflow = -746;
  static constexpr double kLn2High = 0x1.62e42fefap-1, kLn2Low = 0x1.cf79abc9e3b39803fp-40;
  static constexpr int kExpTerms = 13, kLogTerms = 11;
};
template <class T>
using Int = typename FloatTraits<T>::Int;

template <class To, class From>
SIGLIP_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
SIGLIP_INLINE Vector<T> broadcast(T value) {
  return value - Vector<T>{};
}

// Loads the first `count` lanes and zeros the others.
template <class T>
SIGLIP_INLINE Vector<T> load(const T* src, int count = kLanes<T>) {
  Vector<T> vector{};
  std::memcpy(&vector, src, count * sizeof(T));
  return vector;
}

}  // namespace siglip::SIGLIP_ISA_LEVEL
