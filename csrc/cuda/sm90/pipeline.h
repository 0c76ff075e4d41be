// The ring of shared-memory stages between the producer and the consumers: whose turn it is. Compiles for the host too.
//
// The producer fills stages in the order of this multiprocessor's tiles. Tile k belongs to consumer k % kConsumers, so
// that one consumer's epilogue runs under the other's products. Each stage has two barriers, `full` and `empty`; a
// barrier's phase says how often the ring has come round, by its parity.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace siglip::sm90 {

constexpr int kConsumers = 2;
constexpr int kStages = 5;

struct Turn {
  int stage = 0;
  uint32_t parity = 0;  // of the phase of `full` that fills this stage

  SIGLIP_HOST_DEVICE void advance(int steps = 1) {
    stage += steps;
    parity ^= stage / kStages & 1;
    stage %= kStages;
  }
  // The parity for which the producer waits on `empty`: at first it passes, for nothing is in the ring.
  SIGLIP_HOST_DEVICE uint32_t before() const { return parity ^ 1; }
};

}  // namespace siglip::sm90
