// The arithmetic of PTX, for kernels that ptx.py translates. Registers hold bits; a float exists within an instruction.
//
// A NaN that an instruction gives is PTX's canonical one. A signalling NaN is an accumulator in flight: moves keep it,
// and arithmetic on it ends the launch.
#pragma once

#include <algorithm>
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
  if constexpr (sizeof(T) == sizeof(float)) track_registers(registers, kCount);
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

// As the runtime's, with the accumulators one by one.
template <class... Registers>
void wgmma(Half type, uint64_t a, uint64_t b, bool accumulate, Registers&... registers) {
  uint32_t* const accumulators[] = {&registers...};
  wgmma(type, 2 * sizeof...(registers), accumulators, a, b, accumulate);
}

inline void ld_param(uint64_t address, void* value, uint32_t bytes) {
  std::memcpy(value, reinterpret_cast<const void*>(address), bytes);
}

// ---- integers ----

template <class T>
T shift_left(T value, uint32_t count) {
  return count < 8 * sizeof(T) ? T(uint64_t(value) << count) : T(0);
}
template <class T>
T shift_right(T value, uint32_t count) {
  return count < 8 * sizeof(T) ? T(value >> count) : T(value < 0 ? -1 : 0);
}

// bfe: the field of `length` bits from `position` on, and its sign or zeros.
template <class T>
T extract(T value, uint32_t position, uint32_t length) {
  const uint32_t above = 8 * sizeof(T) - std::min<uint32_t>(length & 255, 8 * sizeof(T));
  return shift_right(shift_left(shift_right(value, position & 255), above), above);
}
template <class T>
T insert(T field, T value, uint32_t position, uint32_t length) {
  const T mask = shift_left(T(~shift_left(T(-1), length & 255)), position & 255);
  return T((value & ~mask) | (shift_left(field, position & 255) & mask));
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

// Rounded to nearest even. A double of this scale has the half's exponent, and is denormal where the half is.
inline uint16_t half_bits(float value, double scale, uint32_t dropped, uint64_t infinity) {
  if (value != value) return kCanonicalHalfNan;
  const uint64_t bits = __builtin_bit_cast(uint64_t, __builtin_fabs(value) * scale);
  const uint64_t rounded = (bits + (uint64_t(1) << (dropped - 1)) - 1 + (bits >> dropped & 1)) >> dropped;
  return uint16_t(std::min(rounded, infinity) | (__builtin_signbit(value) ? 0x8000 : 0));
}
inline uint16_t bits_of_bf16(float value) { return half_bits(value, 0x1p-896, 45, 0x7f80); }
inline uint16_t bits_of_f16(float value) { return half_bits(value, 0x1p-1008, 42, 0x7c00); }

// .ftz
inline float flush(float value) {
  return __builtin_isless(__builtin_fabsf(value), 0x1p-126f) ? __builtin_copysignf(0, value) : value;
}

// The greater one, where -0 < +0; the number, if the other is NaN.
inline float maximum(float a, float b) {
  return a != b ? __builtin_fmaxf(a, b) : __builtin_signbit(a) ? b : a;
}

// The sum, rounded toward zero.
inline float add_rz(float a, float b) {
  std::fesetround(FE_TOWARDZERO);
  const volatile float x = a, sum = x + b;  // between the two calls, whatever the compiler thinks of them
  std::fesetround(FE_TONEAREST);
  return sum;
}

}  // namespace hopper
