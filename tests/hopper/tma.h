// A tensor map: CUtensorMap's 128 bytes, as this emulation fills them in.
#pragma once

#include <cstdint>

namespace hopper {

constexpr uint64_t kTensorMapMagic = 0x70616d726f736e74;

struct alignas(64) TensorMap {
  uint64_t magic;
  uint64_t address;
  uint64_t columns, rows, row_bytes;  // of the tensor, with elements of 2 bytes
  uint32_t box_columns, box_rows;
  uint32_t swizzle;  // bytes of a row in which it repeats: 128, 64, 32; 16 without
};
static_assert(sizeof(TensorMap) <= 128);

}  // namespace hopper
