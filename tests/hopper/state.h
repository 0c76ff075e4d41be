// The state of the emulated machine: a CTA, its warps and threads, and what is in flight.
#pragma once

#include <setjmp.h>

#include <array>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "clocks.h"
#include "machine.h"

namespace hopper {

constexpr uint32_t kWarpLanes = 32, kWarpgroupWarps = 4, kEveryLane = ~0u;
constexpr uint32_t kSharedBytes = 227 * 1024;  // of a CTA
constexpr uint32_t kReservedShared = 1024;     // at the beginning of the window, as on the device
constexpr uint32_t kWindowBytes = kReservedShared + kSharedBytes;
constexpr uint32_t kMaxAccumulators = 128;  // of a thread, in one wgmma

struct Warp;

struct Registers {
  uint32_t* base;
  const uint16_t* indices;
  uint32_t count;
};

struct Thread {
  Warp* warp;
  uint32_t lane, index, registers;  // index: in the CTA
  bool started = false, exited = false;
  jmp_buf context;
  const char* waits_for = "";  // while it is suspended, at `waits_at`
  uint32_t waits_at = 0;
  uint32_t refused = 0;  // the last try_wait that failed although it need not
  std::vector<Registers> tracked;
};

using Lanes = std::array<void*, kWarpLanes>;  // a pointer of each lane
using Action = void (*)(Warp&, const Lanes&);

// An instruction for which the lanes of a warp wait for each other.
struct Convergence {
  const char* name = nullptr;  // null: none
  uint32_t site = 0, mask = 0, arrived = 0, generation = 0;
  Lanes arguments{};
};

// One warp's quarter of a wgmma: 16 rows. A lane's accumulators begin as bits of floats, or as tokens of earlier ones.
struct Wgmma {
  WgmmaShape shape;
  bool executed = false;
  uint32_t token, group;
  std::array<std::array<uint32_t, kMaxAccumulators>, kWarpLanes> values;
  std::array<std::array<bool, kMaxAccumulators>, kWarpLanes> found{};  // in a register, or taken by a later wgmma
};

struct Warp {
  uint32_t index, runnable = kEveryLane, exited = 0;  // masks of lanes
  Thread threads[kWarpLanes];
  Knowledge knowledge;
  Convergence convergence;
  std::deque<std::unique_ptr<Wgmma>> wgmmas;
  uint32_t wgmma_count = 0, wgmma_committed = 0;
  bool wgmma_fenced = false;
  uint32_t bulk_committed = 0, bulk_issued = 0;  // groups
  uint32_t bulk_lane = kWarpLanes;               // the one that stores
  uint32_t proxy_fenced = 0;  // lanes that have executed fence.proxy.async since their last store

  uint32_t actor(Kind kind) const { return hopper::actor(kind, index); }
  uint32_t& tick(Kind kind) { return knowledge.happened[actor(kind)]; }
  Access access(Kind kind, uint32_t tick) const { return {knowledge, actor(kind), tick, kind != Kind::kWarp}; }
  // Hands on what this warp knows; what it does from now on is not part of it.
  void release(Knowledge& into) {
    into.join(knowledge);
    ++tick(Kind::kWarp);
  }
};

struct Mbarrier {
  uint32_t actor, address, count = 0, pending;  // a count of 0: there is none
  bool published;                               // by fence.mbarrier_init
  uint32_t init_actor, init_tick;
  int64_t bytes;            // of the phase, announced and not yet here
  uint32_t completed;       // phases since init
  uint32_t first_tick = 0;  // the actor's clock at init
  Knowledge gathered, released;
  std::vector<Thread*> waiting;

  uint32_t tick() const { return first_tick + completed; }
};

struct NamedBarrier {
  uint32_t expected = 0, arrived = 0, generation = 0;
  Knowledge gathered, released;
  std::vector<Thread*> waiting;
};

// Work in flight. `group`: the bulk group of `warp` that waits for it; 0 for loads and wgmmas.
struct Async {
  Warp* warp;
  uint32_t group;
  bool in_order;  // after earlier ones of the warp: a wgmma
  std::function<void()> run;
};

struct Cta {
  uint32_t index;  // ctaid
  std::vector<std::unique_ptr<Warp>> warps;  // in the order of their priorities
  uint32_t live_threads;
  uint8_t* shared;  // the window
  uint32_t shared_begin, shared_end;
  Shadow shadow{kWindowBytes};
  std::array<Mbarrier, kMaxMbarriers> mbarriers;
  std::array<NamedBarrier, 16> barriers;
  uint32_t free_registers;
  std::vector<Thread*> waiting_for_registers;
  std::vector<std::vector<uint64_t>> warpgroup_wgmmas;  // what the first warp of each warpgroup issued
  std::vector<Async> in_flight;
};

enum class Schedule { kRandom, kStarve, kPriority, kRoundRobin };
enum class Timing { kRandom, kAtOnce, kLate };

struct Machine {
  // Set before a launch.
  uint64_t seed = 0;
  std::mt19937_64 random;
  Schedule schedule = Schedule::kRandom;
  Timing timing = Timing::kRandom;
  bool strict_mbarriers = true;                       // bulk copies need fence.mbarrier_init, not just a barrier
  std::vector<std::pair<uint64_t, uint64_t>> global;  // from and to: what kernels may access
  uint64_t stmatrix_conflicts = 0;
  std::string error;

  uint32_t threads = 0, grid = 0;  // of the launch

  bool chance(uint32_t one_in) { return random() % one_in == 0; }
};

extern Machine machine;
extern std::unique_ptr<Cta> cta;  // the running one: they run one after another
extern Thread* self;              // the running thread; null in the scheduler

// ---- scheduler.cpp ----
// Suspends the running thread until `wake`; `waiting`: where to note it.
void suspend(const char* waits_for, std::vector<Thread*>& waiting);
void wake(std::vector<Thread*>& waiting);
// Lets others run now and then. Every instruction that others can observe begins with it.
void yield();
// Waits for the lanes of `mask`; the last of them runs `action` for all. `aligned`: all are at the same place.
void converge(const char* name, uint32_t mask, bool aligned, void* arguments, Action action);
// Runs the first that is in flight and fits; false if there is none.
bool run_async(const std::function<bool(const Async&)>& fits);

// ---- memory.cpp ----
uint8_t* shared_bytes(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what);
// An ordinary store of these lanes of the warp.
void store_shared(Warp& warp, uint32_t address, const void* value, uint32_t bytes, uint32_t lanes, const char* what);
void check_global(uint64_t address, uint64_t bytes, const char* what);
// A shared address under a swizzle that repeats over `span` bytes of a row: 128, 64, 32; 16 for none.
inline uint32_t swizzle(uint32_t address, uint32_t span) { return address ^ (((address >> 7) & (span / 16 - 1)) << 4); }

// ---- sync.cpp ----
// The mbarrier there, which `knowledge` must know to be initialised.
Mbarrier& find_mbarrier(uint32_t address, const char* what);
void complete_bytes(Mbarrier& mbarrier, uint32_t phase, uint32_t bytes);

// ---- wgmma.cpp ----
void check_warpgroups();

}  // namespace hopper
