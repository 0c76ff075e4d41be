// Layouts of a tile's elements: operands and dz in swizzled shared memory, the WGMMA accumulator in registers. Compiles
// for the host too.
#pragma once

#include "host_device.h"

namespace siglip::sm90 {

constexpr int kStoreBoxColumns = 64;  // of dz, in the box of one TMA store: 128 bytes, the width of the swizzle

// Row and column of a lane's i-th accumulator element, in the 16 rows of its warp.
SIGLIP_HOST_DEVICE int accumulator_row(int lane, int i) { return lane / 4 + (i & 2) * 4; }
SIGLIP_HOST_DEVICE int accumulator_column(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + (i & 1); }

// Byte offset of the row that this lane addresses in stmatrix_x4, for the 16 × 16 elements that start at the 16-byte
// chunk `chunk` of 16 rows. The 128-byte swizzle XORs a chunk's number with its row's.
SIGLIP_HOST_DEVICE int swizzled_offset(int lane, int chunk) {
  const int row = lane % 16;
  return row * kStoreBoxColumns * 2 + (((chunk + lane / 16) ^ row % 8) * 16);
}

// Matrix descriptor of a K-major operand in TMA's 128-byte swizzle: rows of 128 bytes, eight of them 1024 bytes.
SIGLIP_HOST_DEVICE uint64_t make_smem_desc(uint32_t smem_address) {
  constexpr uint64_t kSwizzle128B = uint64_t(1) << 62, kStrideByteOffset = uint64_t(1024 >> 4) << 32;
  constexpr uint64_t kLeadingByteOffset = uint64_t(1) << 16;  // ignored in a swizzled layout
  return kSwizzle128B | kStrideByteOffset | kLeadingByteOffset | ((smem_address & 0x3ffff) >> 4);
}
// Descriptors hold addresses in units of 16 bytes.
SIGLIP_HOST_DEVICE constexpr uint64_t desc_offset(int bytes) { return bytes >> 4; }

}  // namespace siglip::sm90
