// The ring of shared-memory stages between the producer and the consumers: whose turn it is. Compiles for the host too.
//
// The producer fills stages in the order of this multiprocessor's tiles. Tile k belongs to consumer k % kConsumers, so
// that one consumer's epilogue runs under the other's products. Each stage has two barriers, `full` and `empty`; a
// barrier's phase says how often the ring has come round, by its parity alone. So that no consumer mistakes a round for
// the one before, it waits at its barrier `turn` until the consumer of the tile before has seen all of its stages.
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

// The parity for which a consumer waits on its `turn` before its tile number `own`, counted from 0: the first tile of
// all comes after none.
SIGLIP_HOST_DEVICE uint32_t turn_parity(int consumer, int own) { return (own & 1) ^ (consumer == 0); }
SIGLIP_HOST_DEVICE int next_consumer(int consumer) { return (consumer + 1) % kConsumers; }

}  // namespace siglip::sm90
