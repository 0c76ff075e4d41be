// Which tile of the logits comes when. Compiles for the host too, where it is tested.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace siglip::sm90 {

constexpr int kBlockM = 128, kBlockN = 128, kBlockK = 64;  // a tile's images and texts, the features of a stage

struct Tile {
  int m, n;  // the first image, the first text
};

// Groups of kGroup rows of tiles, each gone through column by column: tiles that are worked on together share operands
// in L2.
class Tiles {
 public:
  static constexpr int kGroup = 8;

  SIGLIP_HOST_DEVICE Tiles(int rows, int cols)
      : in_m_((rows + kBlockM - 1) / kBlockM), in_n_((cols + kBlockN - 1) / kBlockN) {}

  SIGLIP_HOST_DEVICE int count() const { return in_m_ * in_n_; }

  SIGLIP_HOST_DEVICE Tile at(int index) const {
    const int group = index / (kGroup * in_n_), inside = index % (kGroup * in_n_);
    const int left = in_m_ - group * kGroup, rows = left < kGroup ? left : kGroup;
    return {(group * kGroup + inside % rows) * kBlockM, inside / rows * kBlockN};
  }

 private:
  int in_m_, in_n_;
};

// The features of a tile come in so many stages.
SIGLIP_HOST_DEVICE int stages_of(int features) { return (features + kBlockK - 1) / kBlockK; }

}  // namespace siglip::sm90
