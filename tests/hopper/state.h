// The state of the emulated machine: what has happened before what, a CTA, its warps and threads, what is in flight.
#pragma once

#include <setjmp.h>

#include <algorithm>
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

#include "machine.h"

namespace hopper {

// ---- what has happened before what: vector clocks, and who last touched each word of shared memory ----
// Every warp counts its own releases; its wgmma groups, its bulk groups and every mbarrier's phases count as actors of
// their own, because what they do is asynchronous. An access is a race unless whoever makes it knows that the earlier
// ones have ended, whatever the order in which the emulation happened to run them.

constexpr uint32_t kMaxWarps = 16, kMaxMbarriers = 24;
// Actors, in this order. The first three kinds can read shared memory; all but the first are of the async proxy.
// kShown: what of a warp's stores a fence.proxy.async has shown to that proxy.
enum Kind : uint32_t { kWarp, kWgmmaGroups, kBulkGroups, kShown, kMbarrier };
constexpr const char* kReaderNames[] = {"load of another warp", "wgmma that reads here", "bulk copy that reads here"};
constexpr uint32_t kReaders = 3 * kMaxWarps, kActors = kMbarrier * kMaxWarps + kMaxMbarriers + 1;
constexpr uint32_t kHoldsMbarrier = UINT32_MAX;  // the tick of a write that only mbarrier.inval may follow

inline uint32_t actor(Kind kind, uint32_t index) { return kind * kMaxWarps + index; }
inline bool is_async(uint32_t actor) { return actor >= kMaxWarps; }

// What an actor does at a tick of its clock. At tick 0 it has done nothing.
struct Event {
  uint32_t actor = 0, tick = 0;
};

// What somebody knows to have happened: a tick of each actor.
struct Clock {
  std::array<uint32_t, kActors> ticks{};

  bool knows(const Event& event) const { return ticks[event.actor] >= event.tick; }
  void join(const Clock& other) {
    for (uint32_t i = 0; i < kActors; ++i) ticks[i] = std::max(ticks[i], other.ticks[i]);
  }
};

// The last accesses to shared memory: writes by 4-byte word, reads by 16-byte chunk. `known`: to whoever makes one.
class Shadow {
 public:
  explicit Shadow(uint32_t bytes) : writes_(bytes / 4), reads_(bytes / 16) {}

  void read(uint32_t begin, uint32_t bytes, Event event, const Clock& known) {
    for (uint32_t word = begin / 4; word <= (begin + bytes - 1) / 4; ++word) {
      check_written(writes_[word], event, known);
      reads_[word / 4][event.actor] = event.tick;
    }
  }

  void write(uint32_t begin, uint32_t bytes, Event event, const Clock& known, bool checked = true) {
    for (uint32_t chunk = begin / 16; chunk <= (begin + bytes - 1) / 16; ++chunk)
      for (uint32_t i = 0; checked && i < kReaders; ++i)
        if (!known.knows({i, reads_[chunk][i]})) fail("a race with a %s", kReaderNames[i / kMaxWarps]);
    for (uint32_t word = begin / 4; word <= (begin + bytes - 1) / 4; ++word) {
      if (checked && writes_[word].tick) check_written(writes_[word], event, known);
      writes_[word] = event;
    }
  }

  // Whether an ordinary store of another warp was the last here.
  bool written_by_other_warp(uint32_t begin, uint32_t warp) const {
    const Event& write = writes_[begin / 4];
    return write.tick && !is_async(write.actor) && write.actor != actor(kWarp, warp);
  }

 private:
  void check_written(const Event& write, const Event& event, const Clock& known) const {
    if (!write.tick) fail("shared memory that nobody has written");
    if (write.tick == kHoldsMbarrier) fail("shared memory that holds an mbarrier");
    if (!known.knows(write))
      fail("a race with a %s", is_async(write.actor) ? "bulk copy that writes here" : "store of another warp");
    if (is_async(event.actor) && !is_async(write.actor) && !known.knows({actor(kShown, write.actor), write.tick}))
      fail("an ordinary store without fence.proxy.async before the async proxy");
  }

  std::vector<Event> writes_;
  std::vector<std::array<uint32_t, kReaders>> reads_;
};

// ---- a CTA, its warps and threads ----
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
  uint64_t wgmma_history = 0;            // a hash of all that it issued
  uint32_t wgmma_count = 0;
  bool wgmma_fenced = false;
  uint32_t bulk_issued = 0, bulk_lane = kWarpLanes;  // the last group with a store, and the lane that stores
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
  uint32_t index, live_threads;  // ctaid; how many have not exited
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
