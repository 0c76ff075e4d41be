// Layouts of a tile's elements: the WGMMA accumulator in registers, and dz in swizzled shared memory. Compiles for the
// host too.
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

}  // namespace siglip::sm90
