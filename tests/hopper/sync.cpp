// mbarriers, barriers of a CTA and of a cluster, and the registers that warps hand to each other.

#include "state.h"

namespace hopper {
namespace {

constexpr uint32_t kMbarrierBytes = 8, kMaxArrivals = (1u << 20) - 1;

Mbarrier* lookup(Cta& cta, uint32_t address) {
  for (Mbarrier& mbarrier : cta.mbarriers)
    if (mbarrier.live && mbarrier.address == address) return &mbarrier;
  return nullptr;
}

void complete_if_done(Mbarrier& mbarrier) {
  if (mbarrier.pending || mbarrier.bytes) return;
  ++mbarrier.completed;
  mbarrier.pending = mbarrier.count;
  mbarrier.gathered.happened[mbarrier.actor] = mbarrier.gathered.proxied[mbarrier.actor] = mbarrier.tick();
  mbarrier.released = mbarrier.gathered;
  wake_all(mbarrier.waiting);
}

Mbarrier& use_mbarrier(uint32_t address, const char* what) {
  Cta& cta = cta_of(address);
  Mbarrier& mbarrier = find_mbarrier(cta, address, what);
  if (self->warp->knowledge.happened[mbarrier.init_actor] < mbarrier.init_tick)
    fail("%s: nothing orders it after mbarrier.init", what);
  return mbarrier;
}

void arrive(Mbarrier& mbarrier, const char* what) {
  if (!mbarrier.pending) fail("%s: more arrivals than the mbarrier's count of %u", what, mbarrier.count);
  self->warp->release(mbarrier.gathered);
  --mbarrier.pending;
  complete_if_done(mbarrier);
}

// Arrives at a barrier of `expected` threads.
void arrive_at(NamedBarrier& barrier, uint32_t expected) {
  if (barrier.arrived && barrier.expected != expected)
    fail("a barrier of %u threads, which others use with %u", expected, barrier.expected);
  barrier.expected = expected;
  self->warp->release(barrier.gathered);
  if (++barrier.arrived < expected) return;
  barrier.arrived = 0;
  ++barrier.generation;
  barrier.released = barrier.gathered;
  wake_all(barrier.waiting);
}

void wait_at(NamedBarrier& barrier, uint32_t generation, const char* what) {
  while (barrier.generation == generation) {
    barrier.waiting.push_back(self);
    suspend(what);
  }
  self->warp->acquire(barrier.released);
}

void check_register_count(uint32_t registers) {
  if (registers < 24 || registers > 256 || registers % 8) fail("setmaxnreg: %u registers", registers);
}

void set_registers(Warp& warp, uint32_t registers) {
  warp.cta->free_registers += (warp.registers - registers) * kWarpLanes;
  warp.registers = registers;
}

}  // namespace

Mbarrier& find_mbarrier(Cta& cta, uint32_t address, const char* what) {
  Mbarrier* const mbarrier = lookup(cta, address);
  if (!mbarrier) fail("%s: no mbarrier at %u", what, address);
  return *mbarrier;
}

void complete_bytes(Cta& cta, uint32_t address, uint32_t phase, uint32_t bytes) {
  Mbarrier& mbarrier = find_mbarrier(cta, address, "a bulk copy");
  if (mbarrier.tick() + 1 != phase) fail("the mbarrier's phase ended before the bytes of a bulk copy came");
  mbarrier.bytes -= bytes;
  complete_if_done(mbarrier);
}

void mbarrier_init(uint32_t address, uint32_t count) {
  yield();
  Warp& warp = *self->warp;
  Cta& cta = *warp.cta;
  shared_bytes(cta, address, kMbarrierBytes, kMbarrierBytes, "mbarrier.init");
  if (!count || count > kMaxArrivals) fail("mbarrier.init: a count of %u", count);
  if (lookup(cta, address)) fail("mbarrier.init: there is one already");
  for (Mbarrier& mbarrier : cta.mbarriers) {
    if (mbarrier.live) continue;
    const uint32_t tick = mbarrier.tick();
    mbarrier = {address, count, count, mbarrier.actor, true, false, warp.actor(Kind::kWarp), warp.tick(), 0, 0, tick,
                {}, {}, {}};
    cta.shadow.own(address, kMbarrierBytes, mbarrier.actor, UINT32_MAX);
    return;
  }
  fail("more mbarriers than the emulation has");
}

void mbarrier_inval(uint32_t address) {
  yield();
  Mbarrier& mbarrier = use_mbarrier(address, "mbarrier.inval");
  if (!mbarrier.waiting.empty()) fail("mbarrier.inval: a thread waits there");
  if (mbarrier.bytes) fail("mbarrier.inval: a bulk copy is under way");
  mbarrier.live = false;
  self->warp->cta->shadow.own(address, kMbarrierBytes, self->warp->actor(Kind::kWarp), self->warp->tick());
}

void fence_mbarrier_init() {
  yield();
  for (Mbarrier& mbarrier : self->warp->cta->mbarriers)
    if (mbarrier.live && mbarrier.init_actor == self->warp->actor(Kind::kWarp)) mbarrier.published = true;
}

void mbarrier_arrive(uint32_t address) {
  yield();
  arrive(use_mbarrier(address, "mbarrier.arrive"), "mbarrier.arrive");
}

void mbarrier_arrive_expect_tx(uint32_t address, uint32_t bytes) {
  yield();
  Mbarrier& mbarrier = use_mbarrier(address, "mbarrier.arrive.expect_tx");
  mbarrier.bytes += bytes;
  arrive(mbarrier, "mbarrier.arrive.expect_tx");
}

bool mbarrier_try_wait_parity(uint32_t address, uint32_t parity) {
  yield();
  const char* const what = "mbarrier.try_wait";
  Mbarrier& mbarrier = use_mbarrier(address, what);
  if (parity > 1) fail("%s: a parity of %u", what, parity);
  if (machine.chance(8)) return false;
  while ((mbarrier.completed & 1) == parity) {
    mbarrier.waiting.push_back(self);
    suspend(what);
  }
  self->warp->acquire(mbarrier.released);
  return true;
}

void bar_sync(uint32_t id, uint32_t threads) {
  yield();
  Cta& cta = *self->warp->cta;
  if (id >= cta.barriers.size()) fail("bar.sync: barrier %u", id);
  if (threads % kWarpLanes) fail("bar.sync: %u threads are not whole warps", threads);
  NamedBarrier& barrier = cta.barriers[id];
  const uint32_t generation = barrier.generation;
  arrive_at(barrier, threads ? threads : machine.threads);
  wait_at(barrier, generation, "bar.sync");
}

void cluster_arrive() {
  yield();
  if (self->cluster_phase) fail("barrier.cluster.arrive: a second time without a wait");
  self->cluster_phase = machine.cluster_barrier.generation + 1;
  arrive_at(machine.cluster_barrier, machine.threads * machine.cluster);
}

void cluster_wait() {
  yield();
  if (!self->cluster_phase) fail("barrier.cluster.wait: without an arrive");
  wait_at(machine.cluster_barrier, self->cluster_phase - 1, "barrier.cluster.wait");
  self->cluster_phase = 0;
}

void setmaxnreg_dec(uint32_t registers) {
  converge("setmaxnreg.dec", kEveryLane, true, &registers, [](Warp& warp, const Lanes& lanes) {
    const uint32_t wanted = *static_cast<uint32_t*>(lanes[0]);
    check_register_count(wanted);
    if (wanted > warp.registers) fail("setmaxnreg.dec: to %u, from %u", wanted, warp.registers);
    set_registers(warp, wanted);
    wake_all(warp.cta->waiting_for_registers);
  });
}

void setmaxnreg_inc(uint32_t registers) {
  struct Request {
    uint32_t registers;
    bool granted;
  } request{registers, false};
  check_register_count(registers);
  Warp& warp = *self->warp;
  if (registers < warp.registers) fail("setmaxnreg.inc: to %u, from %u", registers, warp.registers);
  while (!request.granted) {
    while ((registers - warp.registers) * kWarpLanes > warp.cta->free_registers) {
      warp.cta->waiting_for_registers.push_back(self);
      suspend("setmaxnreg.inc");
    }
    converge("setmaxnreg.inc", kEveryLane, true, &request, [](Warp& warp, const Lanes& lanes) {
      const uint32_t wanted = static_cast<Request*>(lanes[0])->registers;
      const bool enough = (wanted - warp.registers) * kWarpLanes <= warp.cta->free_registers;
      if (enough) set_registers(warp, wanted);
      for (void* lane : lanes) static_cast<Request*>(lane)->granted = enough;
    });
  }
}

}  // namespace hopper
