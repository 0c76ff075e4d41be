// The arithmetic of PTX, for kernels that ptx.py translates. Registers hold bits; a float exists within an instruction.
//
// A NaN that an instruction gives is PTX's canonical one. A signalling NaN is an accumulator in flight: moves keep it, and
// arithmetic on it ends the launch.
#pragma once

#include <cfenv>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "machine.h"

namespace hopper {

// ---- registers and memory ----

// Quiet NaNs, and false: Triton reads registers that nobody has set, and ignores what it read.
template <class T, size_t kCount>
void poison(T (&registers)[kCount]) {
  std::memset(registers, sizeof(T) == sizeof(bool) ? 0 : 0xff, sizeof registers);
}

// Loads elements of type T, one for each register, in one access. A wider register is filled by T's sign or zeros.
template <class T, class Address, class... Registers>
void load(void (*ld)(Address, void*, uint32_t), Address address, Registers&... registers) {
  T values[sizeof...(registers)];
  ld(address, values, sizeof values);
  size_t i = 0;
  ((registers = values[i++]), ...);
}
template <class T, class Address, class... Values>
void store(void (*st)(Address, const void*, uint32_t), Address address, Values... bits) {
  const T values[] = {T(bits)...};
  st(address, values, sizeof values);
}

inline void stmatrix(uint32_t address, uint32_t v0, uint32_t v1, uint32_t v2, uint32_t v3) {
  stmatrix_x4(address, {v0, v1, v2, v3});
}

inline const void* pointer(uint64_t address) { return reinterpret_cast<const void*>(address); }
inline void ld_param(uint64_t address, void* value, uint32_t bytes) { std::memcpy(value, pointer(address), bytes); }

// ---- integers ----

template <class T>
constexpr uint32_t kBits = 8 * sizeof(T);

template <class T>
T shift_left(T value, uint32_t count) {
  return count < kBits<T> ? T(value << count) : T(0);
}
template <class T>
T shift_right(T value, uint32_t count) {
  return count < kBits<T> ? T(value >> count) : T(value < 0 ? -1 : 0);
}

// By zero: what the hardware gives, all ones and the dividend.
template <class T>
T quotient(T a, T b) {
  if (b == 0) return T(-1);
  return b == T(-1) && T(-1) < 0 ? T(uint64_t(0) - uint64_t(a)) : T(a / b);
}

// bfe: the field of `length` bits from `position` on, and its sign or zeros.
template <class T>
T extract(T value, uint32_t position, uint32_t length) {
  position &= 255, length &= 255;
  if (length == 0) return 0;
  const T field = shift_right(value, position);
  if (length >= kBits<T>) return field;
  const uint32_t above = kBits<T> - length;
  return shift_right(T(uint64_t(field) << above), above);
}
template <class T>
T insert(T field, T value, uint32_t position, uint32_t length) {
  position &= 255, length &= 255;
  const T mask = shift_left(T(~shift_left(T(~T(0)), length)), position);
  return T((value & ~mask) | (shift_left(field, position) & mask));
}

// ---- floats ----

constexpr uint32_t kInfinity = 0x7f800000, kQuietBit = 0x00400000, kCanonicalNan = 0x7fffffff;
constexpr uint16_t kCanonicalHalfNan = 0x7fff;

inline float f32_of(uint32_t bits) {
  if ((bits & (kInfinity | kQuietBit)) == kInfinity && bits & (kQuietBit - 1))
    fail("arithmetic on an accumulator in flight");
  return __builtin_bit_cast(float, bits);
}
inline uint32_t bits_of(float value) {
  if (value == value) return __builtin_bit_cast(uint32_t, value);
  std::feclearexcept(FE_INVALID);  // of Inf - Inf and the like: no error in PTX, which has no such flag
  return kCanonicalNan;
}

inline uint16_t bits_of_bf16(float value) {
  if (value != value) return kCanonicalHalfNan;
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t bits_of_f16(float value) {
  if (value != value) return kCanonicalHalfNan;
  const float magnitude = __builtin_fabsf(value);
  const uint32_t bits = __builtin_bit_cast(uint32_t, magnitude), sign = __builtin_signbit(value) ? 0x8000 : 0;
  if (magnitude >= 65520.0f) return uint16_t(sign | 0x7c00);
  if (magnitude < 0x1p-14f) return uint16_t(sign | uint32_t(__builtin_rintf(magnitude * 0x1p24f)));
  return uint16_t(sign | (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13);
}

// .ftz
inline float flush(float value) {
  return __builtin_isless(__builtin_fabsf(value), 0x1p-126f) ? __builtin_copysignf(0, value) : value;
}

template <class T> bool is_eq(T a, T b) { return a == b; }
template <class T> bool is_ne(T a, T b) { return a != b; }
template <class T> bool is_lt(T a, T b) { return a < b; }
template <class T> bool is_le(T a, T b) { return a <= b; }
template <class T> bool is_gt(T a, T b) { return a > b; }
template <class T> bool is_ge(T a, T b) { return a >= b; }
// Comparisons of floats are false if one is NaN, but neu. C++'s < would raise FE_INVALID.
inline bool is_ne(float a, float b) { return __builtin_islessgreater(a, b); }
inline bool is_lt(float a, float b) { return __builtin_isless(a, b); }
inline bool is_le(float a, float b) { return __builtin_islessequal(a, b); }
inline bool is_gt(float a, float b) { return __builtin_isgreater(a, b); }
inline bool is_ge(float a, float b) { return __builtin_isgreaterequal(a, b); }
inline bool is_neu(float a, float b) { return a != b; }
inline bool is_leu(float a, float b) { return !__builtin_isgreater(a, b); }

// The greater one, where -0 < +0; the number, if the other is NaN.
inline float maximum(float a, float b) {
  if (a != a || b != b) return a != a ? b : a;
  return a > b || (a == b && !__builtin_signbit(a)) ? a : b;
}
inline float minimum(float a, float b) { return -maximum(-a, -b); }

// The sum, rounded toward zero.
inline float add_rz(float a, float b) {
  const double x = a, y = b, sum = x + y;
  float result = float(sum);
  if (!__builtin_isfinite(x) || !__builtin_isfinite(y)) return result;
  const double y_in_sum = sum - x, lost = (x - (sum - y_in_sum)) + (y - y_in_sum);  // x + y == sum + lost
  const double excess = result == sum ? -lost : result - sum;
  if (result > 0 ? excess > 0 : excess < 0) result = __builtin_nextafterf(result, 0);
  return result;
}

}  // namespace hopper
