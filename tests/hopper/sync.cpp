// mbarriers, named barriers, and the registers that warps hand to each other.

#include "state.h"

namespace hopper {
namespace {

constexpr uint32_t kMbarrierBytes = 8;

Mbarrier* lookup(uint32_t address) {
  for (Mbarrier& mbarrier : cta->mbarriers)
    if (mbarrier.count && mbarrier.address == address) return &mbarrier;
  return nullptr;
}

void complete_if_done(Mbarrier& mbarrier) {
  if (mbarrier.pending || mbarrier.bytes) return;
  ++mbarrier.completed;
  mbarrier.pending = mbarrier.count;
  mbarrier.gathered.happened[mbarrier.actor] = mbarrier.gathered.proxied[mbarrier.actor] = mbarrier.tick();
  mbarrier.released = mbarrier.gathered;
  wake(mbarrier.waiting);
}

void arrive(Mbarrier& mbarrier, uint32_t bytes, const char* what) {
  if (!mbarrier.pending) fail("%s: more arrivals than the mbarrier's count of %u", what, mbarrier.count);
  self->warp->release(mbarrier.gathered);
  --mbarrier.pending;
  mbarrier.bytes += bytes;
  complete_if_done(mbarrier);
}

void set_registers(uint32_t registers, const char* what) {
  converge(what, kEveryLane, true, nullptr, [](Warp&, const Lanes&) {});
  if (registers < 24 || registers > 256 || registers % 8) fail("%s: %u registers", what, registers);
  while (registers > self->registers + cta->free_registers) suspend(what, cta->waiting_for_registers);
  cta->free_registers += self->registers - registers;
  self->registers = registers;
  wake(cta->waiting_for_registers);
}

}  // namespace

Mbarrier& find_mbarrier(uint32_t address, const char* what) {
  Mbarrier* const mbarrier = lookup(address);
  if (!mbarrier) fail("%s: no mbarrier at %u", what, address);
  if (self->warp->knowledge.happened[mbarrier->init_actor] < mbarrier->init_tick)
    fail("%s: nothing orders it after mbarrier.init", what);
  return *mbarrier;
}

void complete_bytes(Mbarrier& mbarrier, uint32_t phase, uint32_t bytes) {
  if (mbarrier.tick() + 1 != phase) fail("the mbarrier's phase ended before the bytes of a bulk copy came");
  mbarrier.bytes -= bytes;
  complete_if_done(mbarrier);
}

void mbarrier_init(uint32_t address, uint32_t count) {
  yield();
  Warp& warp = *self->warp;
  shared_bytes(address, kMbarrierBytes, kMbarrierBytes, "mbarrier.init");
  if (!count || count >= 1u << 20) fail("mbarrier.init: a count of %u", count);
  if (lookup(address)) fail("mbarrier.init: there is one already");
  for (Mbarrier& mbarrier : cta->mbarriers) {
    if (mbarrier.count) continue;
    mbarrier.first_tick = mbarrier.tick();
    mbarrier.address = address;
    mbarrier.count = mbarrier.pending = count;
    mbarrier.bytes = mbarrier.completed = mbarrier.published = 0;
    mbarrier.init_actor = warp.actor(Kind::kWarp);
    mbarrier.init_tick = warp.tick(Kind::kWarp);
    mbarrier.gathered = mbarrier.released = {};
    cta->shadow.own(address, kMbarrierBytes, mbarrier.actor, UINT32_MAX);
    return;
  }
  fail("more mbarriers than the emulation has");
}

void mbarrier_inval(uint32_t address) {
  yield();
  Warp& warp = *self->warp;
  Mbarrier& mbarrier = find_mbarrier(address, "mbarrier.inval");
  if (!mbarrier.waiting.empty() || mbarrier.bytes) fail("mbarrier.inval: it is in use");
  mbarrier.count = 0;
  cta->shadow.own(address, kMbarrierBytes, warp.actor(Kind::kWarp), warp.tick(Kind::kWarp));
}

void fence_mbarrier_init() {
  yield();
  for (Mbarrier& mbarrier : cta->mbarriers)
    mbarrier.published |= mbarrier.init_actor == self->warp->actor(Kind::kWarp);
}

void mbarrier_arrive(uint32_t address) {
  yield();
  arrive(find_mbarrier(address, "mbarrier.arrive"), 0, "mbarrier.arrive");
}

void mbarrier_arrive_expect_tx(uint32_t address, uint32_t bytes) {
  yield();
  const char* const what = "mbarrier.arrive.expect_tx";
  arrive(find_mbarrier(address, what), bytes, what);
}

bool mbarrier_try_wait_parity(uint32_t address, uint32_t parity) {
  yield();
  const char* const what = "mbarrier.try_wait";
  Mbarrier& mbarrier = find_mbarrier(address, what);
  if (parity > 1) fail("%s: a parity of %u", what, parity);
  // In some phases it fails once. For all: what one lane learns, the emulation takes for the warp's.
  const uint32_t attempt = mbarrier.tick() * kActors + mbarrier.actor;
  if (self->refused != attempt && (mbarrier.tick() * 5 + mbarrier.actor + machine.seed) % 8 == 0) {
    self->refused = attempt;
    return false;
  }
  while ((mbarrier.completed & 1) == parity) suspend(what, mbarrier.waiting);
  self->warp->knowledge.join(mbarrier.released);
  return true;
}

void bar_sync(uint32_t id, uint32_t threads) {
  yield();
  if (id >= cta->barriers.size()) fail("bar.sync: barrier %u", id);
  if (threads % kWarpLanes) fail("bar.sync: %u threads are not whole warps", threads);
  NamedBarrier& barrier = cta->barriers[id];
  const uint32_t generation = barrier.generation, expected = threads ? threads : machine.threads;
  if (barrier.arrived && barrier.expected != expected)
    fail("a barrier of %u threads, which others use with %u", expected, barrier.expected);
  barrier.expected = expected;
  self->warp->release(barrier.gathered);
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    barrier.released = barrier.gathered;
    wake(barrier.waiting);
  }
  while (barrier.generation == generation) suspend("bar.sync", barrier.waiting);
  self->warp->knowledge.join(barrier.released);
}

void setmaxnreg_dec(uint32_t registers) {
  if (registers > self->registers) fail("setmaxnreg.dec: to %u, from %u", registers, self->registers);
  set_registers(registers, "setmaxnreg.dec");
}
void setmaxnreg_inc(uint32_t registers) {
  if (registers < self->registers) fail("setmaxnreg.inc: to %u, from %u", registers, self->registers);
  set_registers(registers, "setmaxnreg.inc");
}

}  // namespace hopper
