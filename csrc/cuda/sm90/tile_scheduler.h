// Order in which the tiles of the logits are computed. Compiles for the host too, where it is tested.
#pragma once

#include "config.h"
#include "host_device.h"

namespace siglip::sm90 {

struct TileCoord {
  int m, n;  // first image, first text
};

// Grouped order: groups of kGroupM rows of tiles, each column by column, so that tiles in flight share operands in L2.
class TileScheduler {
 public:
  static constexpr int kGroupM = 8;

  SIGLIP_HOST_DEVICE TileScheduler(int rows, int cols)
      : tiles_m_((rows + kBlockM - 1) / kBlockM), tiles_n_((cols + kBlockN - 1) / kBlockN) {}

  SIGLIP_HOST_DEVICE int num_tiles() const { return tiles_m_ * tiles_n_; }

  SIGLIP_HOST_DEVICE TileCoord tile_coord(int index) const {
    const int group = index / (kGroupM * tiles_n_), in_group = index % (kGroupM * tiles_n_);
    const int rows_left = tiles_m_ - group * kGroupM, group_rows = rows_left < kGroupM ? rows_left : kGroupM;
    return {(group * kGroupM + in_group % group_rows) * kBlockM, in_group / group_rows * kBlockN};
  }

 private:
  int tiles_m_, tiles_n_;
};

// Number of stages that the features of one tile fill.
SIGLIP_HOST_DEVICE int num_k_tiles(int features) { return (features + kBlockK - 1) / kBlockK; }

}  // namespace siglip::sm90
