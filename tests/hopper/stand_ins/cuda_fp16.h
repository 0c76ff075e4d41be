// Stands in for CUDA's header: conversion with round to nearest even.
#pragma once

#include <cmath>
#include <cstdint>

struct __half2 {
  uint16_t x, y;
};

inline __half2 __floats2half2_rn(float low, float high) {
  const auto round = [](float value) {
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const float size = std::fabs(value);
    if (std::isnan(value)) return uint16_t(0x7fff);
    if (size >= 65520) return uint16_t(sign | 0x7c00);
    int exponent;
    std::frexp(size, &exponent);
    exponent = exponent < -13 ? -13 : exponent;  // subnormal below 2^-14
    const uint32_t units = uint32_t(std::nearbyint(std::ldexp(size, 11 - exponent)));
    // A mantissa that rounds up to 2048 carries into the exponent by itself.
    return uint16_t(sign | (units < 1024 ? units : units + ((exponent + 13) << 10)));
  };
  return {round(low), round(high)};
}
