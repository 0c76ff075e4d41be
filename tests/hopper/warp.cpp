// Votes, shuffles and stmatrix.

#include <cstring>

#include "state.h"

namespace hopper {
namespace {

struct Vote {
  bool predicate;
  uint32_t mask, ballot;
};

uint32_t ballot(const char* name, bool predicate, uint32_t mask) {
  Vote vote{predicate, mask, 0};
  converge(name, mask, false, &vote, [](Warp&, const Lanes& lanes) {
    const uint32_t mask = static_cast<Vote*>(lanes[self->lane])->mask;
    uint32_t all = 0;
    for (uint32_t lane = 0; lane < kWarpLanes; ++lane)
      if (mask >> lane & 1) all |= uint32_t(static_cast<Vote*>(lanes[lane])->predicate) << lane;
    for (uint32_t lane = 0; lane < kWarpLanes; ++lane)
      if (mask >> lane & 1) static_cast<Vote*>(lanes[lane])->ballot = all;
  });
  return vote.ballot;
}

struct Exchange {
  Shuffle mode;
  uint32_t value, operand, mask, result;
};

struct Matrices {
  uint32_t address;
  const uint32_t* values;
};

}  // namespace

bool vote_any(bool predicate, uint32_t mask) { return ballot("vote.any", predicate, mask) != 0; }
bool vote_all(bool predicate, uint32_t mask) { return ballot("vote.all", predicate, mask) == mask; }

bool elect_sync(uint32_t mask, uint32_t& leader) {
  ballot("elect.sync", true, mask);
  leader = __builtin_ctz(mask);
  return self->lane == leader;
}

uint32_t shfl_sync(Shuffle mode, uint32_t value, uint32_t operand, uint32_t clamp, uint32_t mask) {
  if (clamp != kWarpLanes - 1) fail("shfl.sync: only the whole warp is emulated");
  Exchange exchange{mode, value, operand, mask, 0};
  converge("shfl.sync", mask, false, &exchange, [](Warp&, const Lanes& lanes) {
    const uint32_t mask = static_cast<Exchange*>(lanes[self->lane])->mask;
    for (uint32_t lane = 0; lane < kWarpLanes; ++lane) {
      if (!(mask >> lane & 1)) continue;
      Exchange& own = *static_cast<Exchange*>(lanes[lane]);
      const uint32_t from = (own.mode == Shuffle::kBfly ? lane ^ own.operand : own.operand) % kWarpLanes;
      if (!(mask >> from & 1)) fail("shfl.sync: from lane %u, which the mask lacks", from);
      own.result = static_cast<Exchange*>(lanes[from])->value;
    }
  });
  return exchange.result;
}

// Lane l passes the address of row l % 8 of matrix l / 8, and of each matrix row l / 4, columns l % 4 · 2 and the next.
void stmatrix_x4(uint32_t address, const uint32_t (&values)[4]) {
  Matrices matrices{address, values};
  converge("stmatrix", kEveryLane, true, &matrices, [](Warp& warp, const Lanes& lanes) {
    for (uint32_t matrix = 0; matrix < 4; ++matrix) {
      uint32_t banks = 0;
      for (uint32_t row = 0; row < 8; ++row) {
        const uint32_t at = static_cast<Matrices*>(lanes[8 * matrix + row])->address;
        uint8_t* const memory = shared_bytes(*warp.cta, at, 16, 16, "stmatrix");
        uint32_t words[4];
        for (uint32_t i = 0; i < 4; ++i) words[i] = static_cast<Matrices*>(lanes[4 * row + i])->values[matrix];
        store_shared(warp, memory, words, at, sizeof words, kEveryLane, "stmatrix");
        machine.stmatrix_conflicts += banks >> (at / 16 % 8) & 1;
        banks |= 1u << (at / 16 % 8);
      }
    }
  });
}

}  // namespace hopper
