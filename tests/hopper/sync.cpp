// What threads do together: mbarriers, named barriers, the registers that warps hand to each other, votes and shuffles.

#include "state.h"

namespace hopper {
namespace {

constexpr uint32_t kMbarrierBytes = 8;

void complete(Barrier& barrier) {
  ++barrier.completed;
  barrier.pending = barrier.count;
  barrier.released = barrier.gathered;
  wake(barrier.waiting);
}

void complete_if_done(Mbarrier& mbarrier) {
  if (mbarrier.pending || mbarrier.bytes) return;
  auto& [happened, proxied] = mbarrier.gathered;
  happened[mbarrier.actor] = proxied[mbarrier.actor] = mbarrier.completed + 1;
  complete(mbarrier);
}

void arrive(uint32_t address, uint32_t bytes, const char* what) {
  yield();
  Mbarrier& mbarrier = find_mbarrier(address, what);
  if (!mbarrier.pending) fail("%s: more arrivals than the mbarrier's count of %u", what, mbarrier.count);
  self->warp->release(mbarrier.gathered);
  --mbarrier.pending;
  mbarrier.bytes += bytes;
  complete_if_done(mbarrier);
}

void set_registers(uint32_t registers, bool wrong_way, const char* what) {
  if (wrong_way) fail("%s: to %u, from %u", what, registers, self->registers);
  converge(what, kEveryLane, true);
  if (registers < 24 || registers > 256 || registers % 8) fail("%s: %u registers", what, registers);
  while (registers > self->registers + cta->free_registers) suspend(what, cta->waiting_for_registers);
  cta->free_registers += self->registers - registers;
  self->registers = registers;
  wake(cta->waiting_for_registers);
}

// The lanes of `mask` whose predicate is true.
uint32_t ballot(const char* name, bool predicate, uint32_t mask) {
  const Lanes lanes = converge(name, mask, false, {predicate});
  uint32_t result = 0;
  for (uint32_t lane = 0; lane < kWarpLanes; ++lane) result |= uint32_t(lanes[lane][0]) << lane;
  return result;
}

}  // namespace

Mbarrier& find_mbarrier(uint32_t address, const char* what) {
  Mbarrier& mbarrier = cta->mbarriers[address];
  if (!mbarrier.count) fail("%s: no mbarrier at %u", what, address);
  if (self->warp->knowledge.happened[mbarrier.init_actor] < mbarrier.init_tick)
    fail("%s: nothing orders it after mbarrier.init", what);
  return mbarrier;
}

void complete_bytes(Mbarrier& mbarrier, uint32_t phase, uint32_t bytes) {
  if (mbarrier.completed + 1 != phase) fail("the mbarrier's phase ended before the bytes of a bulk copy came");
  mbarrier.bytes -= bytes;
  complete_if_done(mbarrier);
}

void mbarrier_init(uint32_t address, uint32_t count) {
  yield();
  shared_bytes(address, kMbarrierBytes, kMbarrierBytes, "mbarrier.init");
  if (!count || count >= 1u << 20) fail("mbarrier.init: a count of %u", count);
  Mbarrier& mbarrier = cta->mbarriers[address];
  if (mbarrier.count) fail("mbarrier.init: there is one already");
  if (cta->mbarrier_count == kMaxMbarriers) fail("more mbarriers than the emulation has");
  const Access init = self->warp->access("mbarrier.init");
  mbarrier = {{count, count}, actor(kMbarrier, cta->mbarrier_count++), init.actor, init.tick};
  cta->shadow.write(address, kMbarrierBytes, {init.what, init.knowledge, mbarrier.actor, kHoldsMbarrier});
}

void mbarrier_inval(uint32_t address) {
  yield();
  Mbarrier& mbarrier = find_mbarrier(address, "mbarrier.inval");
  if (!mbarrier.waiting.empty() || mbarrier.bytes) fail("mbarrier.inval: it is in use");
  mbarrier.count = 0;
  cta->shadow.write(address, kMbarrierBytes, self->warp->access("mbarrier.inval"), false);
}

void fence_mbarrier_init() {
  yield();
  for (auto& [address, mbarrier] : cta->mbarriers) mbarrier.published |= mbarrier.init_actor == self->warp->index;
}

void mbarrier_arrive(uint32_t address) { arrive(address, 0, "mbarrier.arrive"); }
void mbarrier_arrive_expect_tx(uint32_t address, uint32_t bytes) { arrive(address, bytes, "mbarrier.arrive.expect_tx"); }

bool mbarrier_try_wait_parity(uint32_t address, uint32_t parity) {
  yield();
  const char* const what = "mbarrier.try_wait";
  Mbarrier& mbarrier = find_mbarrier(address, what);
  if (parity > 1) fail("%s: a parity of %u", what, parity);
  // In some phases it fails once. For all: what one lane learns, the emulation takes for the warp's.
  const uint32_t attempt = mbarrier.completed * kActors + mbarrier.actor;
  if (self->refused != attempt && (mbarrier.completed * 5 + mbarrier.actor + machine.seed) % 8 == 0) {
    self->refused = attempt;
    return false;
  }
  while (mbarrier.completed % 2 == parity) suspend(what, mbarrier.waiting);
  self->warp->knowledge.join(mbarrier.released);
  return true;
}

void bar_sync(uint32_t id, uint32_t threads) {
  yield();
  if (id >= cta->barriers.size()) fail("bar.sync: barrier %u", id);
  if (threads % kWarpLanes) fail("bar.sync: %u threads are not whole warps", threads);
  Barrier& barrier = cta->barriers[id];
  const uint32_t count = threads ? threads : machine.threads;
  if (barrier.pending == barrier.count) barrier.pending = barrier.count = count;  // the first to arrive
  if (barrier.count != count) fail("a barrier of %u threads, which others use with %u", count, barrier.count);
  self->warp->release(barrier.gathered);
  if (--barrier.pending)
    suspend("bar.sync", barrier.waiting);
  else
    complete(barrier);
  self->warp->knowledge.join(barrier.released);
}

void setmaxnreg_dec(uint32_t registers) { set_registers(registers, registers > self->registers, "setmaxnreg.dec"); }
void setmaxnreg_inc(uint32_t registers) { set_registers(registers, registers < self->registers, "setmaxnreg.inc"); }

Lanes converge(const char* name, uint32_t mask, bool aligned, const Operands& own,
               const std::function<void(const Lanes&)>& action) {
  yield();
  Warp& warp = *self->warp;
  if (!(mask >> self->lane & 1)) fail("%s: its mask %x lacks the executing lane", name, mask);
  if (mask & warp.exited) fail("%s: lanes %x have exited", name, mask & warp.exited);
  if (!warp.convergence) warp.convergence = std::make_shared<Convergence>(Convergence{name, site, mask});
  const std::shared_ptr<Convergence> now = warp.convergence;
  if (now->name != name || now->mask != mask || (aligned && now->site != site))
    fail("divergent: %s, while lanes %x wait in %s at %u", name, now->arrived, now->name, now->site);
  now->lanes[self->lane] = own;
  now->arrived |= 1u << self->lane;
  if (now->arrived != mask) {
    suspend(name, now->waiting);
  } else {
    if (action) action(now->lanes);
    warp.convergence.reset();
    wake(now->waiting);
  }
  return now->lanes;
}

bool vote_any(bool predicate, uint32_t mask) { return ballot("vote.any", predicate, mask) != 0; }
bool vote_all(bool predicate, uint32_t mask) { return ballot("vote.all", predicate, mask) == mask; }

bool elect_sync(uint32_t mask, uint32_t& leader) {
  leader = __builtin_ctz(ballot("elect.sync", true, mask));
  return self->lane == leader;
}

uint32_t shfl_idx(uint32_t value, uint32_t lane, uint32_t clamp, uint32_t mask) {
  if (clamp != kWarpLanes - 1 || mask != kEveryLane) fail("shfl.sync: only whole warps are emulated");
  return uint32_t(converge("shfl.sync", mask, false, {value})[lane % kWarpLanes][0]);
}
uint32_t shfl_bfly(uint32_t value, uint32_t lane_mask, uint32_t clamp, uint32_t mask) {
  return shfl_idx(value, self->lane ^ lane_mask, clamp, mask);
}

}  // namespace hopper
