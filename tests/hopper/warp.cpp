// Votes, shuffles and stmatrix.

#include "state.h"

namespace hopper {
namespace {

struct Vote {
  bool predicate;
  uint32_t mask, ballot;
};

// The lanes of `mask` whose predicate is true.
uint32_t ballot(const char* name, bool predicate, uint32_t mask) {
  Vote vote{predicate, mask, 0};
  converge(name, mask, false, &vote, [](Warp&, const Lanes& lanes) {
    const uint32_t mask = static_cast<Vote*>(lanes[self->lane])->mask;
    for (uint32_t to = 0; to < kWarpLanes; ++to)
      for (uint32_t from = 0; from < kWarpLanes; ++from)
        if (mask >> to & mask >> from & 1)
          static_cast<Vote*>(lanes[to])->ballot |= uint32_t(static_cast<Vote*>(lanes[from])->predicate) << from;
  });
  return vote.ballot;
}

struct Exchange {
  uint32_t value, from, result;
};

struct Matrices {
  uint32_t address;
  const uint32_t* values;
};

}  // namespace

bool vote_any(bool predicate, uint32_t mask) { return ballot("vote.any", predicate, mask) != 0; }
bool vote_all(bool predicate, uint32_t mask) { return ballot("vote.all", predicate, mask) == mask; }

bool elect_sync(uint32_t mask, uint32_t& leader) {
  leader = __builtin_ctz(ballot("elect.sync", true, mask));
  return self->lane == leader;
}

uint32_t shfl_sync(Shuffle mode, uint32_t value, uint32_t operand, uint32_t clamp, uint32_t mask) {
  if (clamp != kWarpLanes - 1 || mask != kEveryLane) fail("shfl.sync: only whole warps are emulated");
  Exchange exchange{value, (mode == Shuffle::kBfly ? self->lane ^ operand : operand) % kWarpLanes, 0};
  converge("shfl.sync", mask, false, &exchange, [](Warp&, const Lanes& lanes) {
    for (void* lane : lanes) {
      Exchange& own = *static_cast<Exchange*>(lane);
      own.result = static_cast<Exchange*>(lanes[own.from])->value;
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
        uint32_t words[4];
        for (uint32_t i = 0; i < 4; ++i) words[i] = static_cast<Matrices*>(lanes[4 * row + i])->values[matrix];
        store_shared(warp, at, words, sizeof words, kEveryLane, "stmatrix");
        machine.stmatrix_conflicts += banks >> (at / 16 % 8) & 1;
        banks |= 1u << (at / 16 % 8);
      }
    }
  });
}

}  // namespace hopper
