// Where the elements of a tile are: in a warp's registers, and in shared memory. Compiles for the host too.
#pragma once

#include "host_device.h"

namespace siglip::sm90 {

constexpr int kStoredColumns = 64;  // of dz in a box of the copy engine: 128 bytes, as its swizzle wants

// Of a warp's 16 rows of a product's result: the row and the column of a lane's i-th element.
SIGLIP_HOST_DEVICE int fragment_row(int lane, int i) { return lane / 4 + (i & 2) * 4; }
SIGLIP_HOST_DEVICE int fragment_column(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + (i & 1); }

// stmatrix takes four 8 × 8 matrices, their rows at addresses that the lanes give: byte offset of this lane's, where
// the 16 × 16 elements begin with the 16-byte piece `piece` of 16 rows. Pieces of a row change places with the row.
SIGLIP_HOST_DEVICE int stored_at(int lane, int piece) {
  const int row = lane % 16;
  return row * kStoredColumns * 2 + (((piece + lane / 16) ^ row % 8) * 16);
}

}  // namespace siglip::sm90
