// The state of the emulated machine: a CTA, its warps and threads, and what is in flight.
#pragma once

#include <setjmp.h>

#include <array>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "clocks.h"
#include "machine.h"

namespace hopper {

constexpr uint32_t kWarpLanes = 32, kWarpgroupWarps = 4, kEveryLane = ~0u;
constexpr uint32_t kSharedBytes = 227 * 1024;  // of a CTA
constexpr uint32_t kReservedShared = 1024;     // at the beginning of the window, as on the device
constexpr uint32_t kWindowBytes = kReservedShared + kSharedBytes;

struct Warp;

struct Thread {
  Warp* warp;
  uint32_t lane, registers;
  bool started = false;
  jmp_buf context{};
  const char* instruction = "";  // which it executes, for messages
  uint32_t waits_at = 0;         // its site, while others run
  uint32_t refused = 0;  // the last try_wait that failed although it need not
  std::map<uint32_t*, uint32_t> tracked{};  // arrays of registers that may hold accumulators, and their sizes
};

// What a lane brings to an instruction for which the lanes of its warp wait for each other.
using Operands = std::array<uint64_t, 5>;
using Lanes = std::array<Operands, kWarpLanes>;

// Such an instruction, until the last lane comes.
struct Convergence {
  const char* name;
  uint32_t site, mask, arrived = 0;
  Lanes lanes{};
  std::vector<Thread*> waiting{};
};

// A warp's accumulators of a warpgroup's product: 16 rows. Until they are waited for, registers hold tokens of them.
struct Accumulators {
  uint32_t n, token, group;  // of the last wgmma that adds to them
  float sums[16][256];

  // A lane's i-th, in the ISA's layout.
  float& at(uint32_t lane, uint32_t i) { return sums[lane / 4 + (i & 2) * 4][i / 4 * 8 + lane % 4 * 2 + (i & 1)]; }
};

struct Warp {
  uint32_t index;
  uint32_t runnable = kEveryLane, exited = 0;  // masks of lanes
  Thread threads[kWarpLanes];
  Clock known{};
  std::shared_ptr<Convergence> convergence;
  std::list<Accumulators> accumulators;  // in flight
  uint32_t committed[kShown]{};          // groups of each kind
  uint32_t wgmma_count = 0;
  uint64_t wgmma_history = 0;  // a hash of all that it issued
  bool wgmma_fenced = false;
  uint32_t bulk_issued = 0;         // the last group with a store
  uint32_t bulk_lane = kWarpLanes;  // the one that stores
  uint32_t proxy_fenced = 0;  // lanes that have executed fence.proxy.async since their last store

  Warp(uint32_t index, uint32_t registers) : index(index) {
    for (uint32_t lane = 0; lane < kWarpLanes; ++lane) threads[lane] = {this, lane, registers};
    tick(kWarp) = 1;
  }
  uint32_t& tick(Kind kind) { return known.ticks[actor(kind, index)]; }
  Event event() { return {index, tick(kWarp)}; }  // what a thread does now
  Event group(Kind kind) const { return {actor(kind, index), committed[kind] + 1}; }  // which it issues to now
  // Hands on what this warp knows; what it does from now on is not part of it.
  void release(Clock& into) {
    into.join(known);
    ++tick(kWarp);
  }
};

// A named barrier or an mbarrier: where threads wait until all have arrived that a phase needs.
struct Barrier {
  uint32_t count = 0, pending = 0;  // arrivals of a phase, 0 if there is no mbarrier, and those that are still to come
  int64_t bytes = 0;                // of the phase, announced and not yet here
  uint32_t completed = 0;           // phases: the ticks of its actor
  uint32_t actor = kActors - 1;     // of a named barrier, whose phases nobody asks for
  Event init{};
  bool published = false;  // by fence.mbarrier_init
  Clock gathered{}, released{};
  std::vector<Thread*> waiting{};
};

// Work in flight, and the tick, group or phase, of which it is a part.
struct Async {
  Event event;
  std::function<void()> run;
};

struct Cta {
  uint32_t index, live_threads;  // ctaid
  uint32_t shared_begin, shared_end, free_registers;
  alignas(1024) uint8_t shared[kWindowBytes]{};
  Shadow shadow{kWindowBytes};
  std::deque<Warp> warps{};
  std::vector<Warp*> priorities{};         // the warps, the first first
  std::map<uint32_t, Barrier> barriers{};  // by number, or by address
  uint32_t mbarrier_count = 0;             // ever made
  std::vector<Thread*> waiting_for_registers{};
  std::list<Async> in_flight{};
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
};

inline Machine machine;
inline std::unique_ptr<Cta> cta;  // the running one: they run one after another
inline Thread* self = nullptr;    // the running thread; null in the scheduler
inline Warp& warp() { return *self->warp; }

// ---- scheduler.cpp ----
// What the running thread executes, until it goes out of scope; others may run before it. Every instruction that others
// can observe begins with one.
struct Instruction {
  explicit Instruction(const char* name);
  ~Instruction() { self->instruction = ""; }
};
// Suspends the running thread until `wake`; `waiting`: where to note it.
void suspend(std::vector<Thread*>& waiting);
void wake(std::vector<Thread*>& waiting);
// Does what the running warp has in flight in all but its last `pending` groups. It knows these then.
void wait_groups(Kind kind, uint32_t pending);

// ---- memory.cpp ----
uint8_t* shared_bytes(uint32_t address, uint32_t bytes, uint32_t alignment);
// A shared address under a swizzle that repeats over `span` bytes of a row: 128, 64, 32; 16 for none.
inline uint32_t swizzle(uint32_t address, uint32_t span) { return address ^ (((address >> 7) & (span / 16 - 1)) << 4); }

// ---- sync.cpp ----
// The mbarrier there, which the running warp must know to be initialised.
Barrier& find_mbarrier(uint32_t address);
// Counts arrivals and bytes that have come. The last completes the phase.
void advance(Barrier& barrier, uint32_t arrivals, int64_t bytes);
// An instruction for which the lanes of `mask` wait. Returns what they brought; the last runs `action` for all.
// `aligned`: all are at the same place.
Lanes converge(const char* name, uint32_t mask, bool aligned, const Operands& own = {},
               const std::function<void(const Lanes&)>& action = {});

}  // namespace hopper
