// State of the shared-memory pipeline between the TMA producer and the MMA consumers. Compiles for the host too.
//
// The producer fills the stages in the order of this SM's tiles. In ping-pong tile k goes to consumer k % kNumConsumers.
// Each stage has a full and an empty barrier, and a wait on them sees only the parity of the phase. The ordered barriers
// keep a consumer in ping-pong from mistaking one phase for an earlier one: its mainloop starts when the other has seen
// all its stages.
#pragma once

#include "config.h"
#include "host_device.h"

namespace siglip::sm90 {

struct PipelineState {
  int stage = 0;
  uint32_t phase = 0;  // parity of the full barrier's phase in which this stage is filled

  SIGLIP_HOST_DEVICE void advance(int count = 1) {
    stage += count;
    phase ^= stage / kNumStages & 1;
    stage %= kNumStages;
  }
  // Parity for the producer's wait on the empty barrier: flipped, because at first every stage is free.
  SIGLIP_HOST_DEVICE uint32_t producer_phase() const { return phase ^ 1; }
};

// Parity for a consumer's wait on its ordered barrier before its tile number `iteration`, counted from 0. Consumer 0
// does not wait for its first tile, because no tile comes before it.
SIGLIP_HOST_DEVICE uint32_t ordered_barrier_phase(int consumer, int iteration) {
  return (iteration & 1) ^ (consumer == 0);
}
SIGLIP_HOST_DEVICE int next_consumer(int consumer) { return (consumer + 1) % kNumConsumers; }

}  // namespace siglip::sm90
