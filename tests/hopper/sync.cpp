// What threads do together: mbarriers, named barriers, the registers that warps hand to each other, votes and shuffles.

#include "state.h"

namespace hopper {
namespace {

constexpr uint32_t kMbarrierBytes = 8, kNamedBarriers = 16;

void arrive(Barrier& barrier, int64_t expected_bytes) {
  if (!barrier.pending) fail("more arrivals than the mbarrier's count of %u", barrier.count);
  warp().release(barrier.gathered);
  advance(barrier, 1, -expected_bytes);
}

void set_registers(const char* name, uint32_t registers, bool wrong_way) {
  converge(name, kEveryLane, true);
  const Instruction now(name);
  if (wrong_way) fail("to %u, from %u", registers, self->registers);
  if (registers < 24 || registers > 256 || registers % 8) fail("%u registers", registers);
  while (registers > self->registers + cta->free_registers) suspend(cta->waiting_for_registers);
  cta->free_registers += self->registers - registers;
  self->registers = registers;
  wake(cta->waiting_for_registers);
}

// Whether the predicate is true in a lane of `mask`.
bool is_any(const char* name, bool predicate, uint32_t mask) {
  const Lanes lanes = converge(name, mask, false, {predicate});
  return std::any_of(lanes.begin(), lanes.end(), [](const Operands& lane) { return lane[0] != 0; });
}

}  // namespace

Barrier& find_mbarrier(uint32_t address) {
  Barrier& mbarrier = cta->barriers[address];
  if (!mbarrier.count || address < kReservedShared) fail("no mbarrier at %u", address);
  if (!warp().known.knows(mbarrier.init)) fail("nothing orders it after mbarrier.init");
  return mbarrier;
}

void advance(Barrier& barrier, uint32_t arrivals, int64_t bytes) {
  barrier.pending -= arrivals;
  barrier.bytes -= bytes;
  if (barrier.pending || barrier.bytes) return;
  barrier.pending = barrier.count;
  barrier.gathered.ticks[barrier.actor] = ++barrier.completed;
  barrier.released = barrier.gathered;
  wake(barrier.waiting);
}

void mbarrier_init(uint32_t address, uint32_t count) {
  const Instruction now("mbarrier.init");
  shared_bytes(address, kMbarrierBytes, kMbarrierBytes);
  Barrier& mbarrier = cta->barriers[address];
  if (!count || count >= 1u << 20) fail("a count of %u", count);
  if (mbarrier.count) fail("there is one already");
  if (cta->mbarrier_count == kMaxMbarriers) fail("more mbarriers than the emulation has");
  mbarrier = {count, count, 0, 0, actor(kMbarrier, cta->mbarrier_count++), warp().event()};
  cta->shadow.write(address, kMbarrierBytes, {mbarrier.actor, kHoldsMbarrier}, warp().known);
}

void mbarrier_inval(uint32_t address) {
  const Instruction now("mbarrier.inval");
  Barrier& mbarrier = find_mbarrier(address);
  if (!mbarrier.waiting.empty() || mbarrier.bytes) fail("it is in use");
  mbarrier.count = 0;
  cta->shadow.write(address, kMbarrierBytes, warp().event(), warp().known, false);
}

void fence_mbarrier_init() {
  const Instruction now("fence.mbarrier_init");
  for (auto& [address, mbarrier] : cta->barriers) mbarrier.published |= mbarrier.init.actor == warp().index;
}

void mbarrier_arrive_expect_tx(uint32_t address, uint32_t bytes) {
  const Instruction now("mbarrier.arrive");
  arrive(find_mbarrier(address), bytes);
}

bool mbarrier_try_wait_parity(uint32_t address, uint32_t parity) {
  const Instruction now("mbarrier.try_wait");
  Barrier& mbarrier = find_mbarrier(address);
  if (parity > 1) fail("a parity of %u", parity);
  // In some phases it fails once. For all: what one lane learns, the emulation takes for the warp's.
  const uint32_t attempt = mbarrier.completed * kActors + mbarrier.actor;
  const bool may_fail = (mbarrier.completed * 5 + mbarrier.actor + machine.seed) % 8 == 0;
  if (may_fail && std::exchange(self->refused, attempt) != attempt) return false;
  while (mbarrier.completed % 2 == parity) suspend(mbarrier.waiting);
  warp().known.join(mbarrier.released);
  return true;
}

void bar_sync(uint32_t id, uint32_t threads) {
  const Instruction now("bar.sync");
  if (id >= kNamedBarriers) fail("barrier %u", id);
  if (threads % kWarpLanes) fail("%u threads are not whole warps", threads);
  Barrier& barrier = cta->barriers[id];
  const uint32_t count = threads ? threads : machine.threads, phase = barrier.completed;
  if (barrier.pending == barrier.count) barrier.pending = barrier.count = count;  // the first to arrive
  if (barrier.count != count) fail("a barrier of %u threads, which others use with %u", count, barrier.count);
  arrive(barrier, 0);
  if (barrier.completed == phase) suspend(barrier.waiting);
  warp().known.join(barrier.released);
}

void setmaxnreg_dec(uint32_t registers) { set_registers("setmaxnreg.dec", registers, registers > self->registers); }
void setmaxnreg_inc(uint32_t registers) { set_registers("setmaxnreg.inc", registers, registers < self->registers); }

Lanes converge(const char* name, uint32_t mask, bool aligned, const Operands& own,
               const std::function<void(const Lanes&)>& action) {
  const Instruction instruction(name);
  if (!(mask >> self->lane & 1)) fail("its mask %x lacks the executing lane", mask);
  if (mask & warp().exited) fail("lanes %x have exited", mask & warp().exited);
  if (!warp().convergence) warp().convergence = std::make_shared<Convergence>(Convergence{name, site, mask});
  const std::shared_ptr<Convergence> now = warp().convergence;
  if (now->name != name || now->mask != mask || (aligned && now->site != site))
    fail("divergent, while lanes %x wait in %s at %u", now->arrived, now->name, now->site);
  now->lanes[self->lane] = own;
  now->arrived |= 1u << self->lane;
  if (now->arrived != mask) {
    suspend(now->waiting);
  } else {
    if (action) action(now->lanes);
    warp().convergence.reset();
    wake(now->waiting);
  }
  return now->lanes;
}

bool vote_any(bool predicate, uint32_t mask) { return is_any("vote.any", predicate, mask); }
bool vote_all(bool predicate, uint32_t mask) { return !is_any("vote.all", !predicate, mask); }

bool elect_sync(uint32_t mask, uint32_t& leader) {
  converge("elect.sync", mask, false);
  leader = __builtin_ctz(mask);
  return self->lane == leader;
}

uint32_t shfl_idx(uint32_t value, uint32_t lane, uint32_t clamp, uint32_t mask) {
  if (clamp != kWarpLanes - 1 || mask != kEveryLane) fail("shfl.sync: only whole warps are emulated");
  return uint32_t(converge("shfl.sync", mask, false, {value})[lane % kWarpLanes][0]);
}

}  // namespace hopper
