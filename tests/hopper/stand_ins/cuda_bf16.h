// Stands in for CUDA's header: conversion with round to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat162 {
  uint16_t x, y;
};

inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  const auto round = [](float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(0x7fff);  // NaN
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  };
  return {round(low), round(high)};
}
