// The state of the emulated machine: a cluster of CTAs, their warps and threads, and what is in flight.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <deque>
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
struct Cta;

// A pointer of each lane.
using Lanes = std::array<void*, kWarpLanes>;

struct Registers {
  uint32_t* base;
  const uint16_t* indices;
  uint32_t count;
};

struct Thread {
  Warp* warp = nullptr;
  uint32_t lane = 0;
  bool started = false, exited = false;
  jmp_buf context;
  const char* waits_for = "";  // while it is suspended
  uint32_t waits_at = 0;       // its site
  uint32_t cluster_phase = 0;  // of the cluster barrier, in which it has arrived; 0: it has not
  std::vector<Registers> tracked;

  uint32_t index() const;  // in its CTA
};

// An instruction for which the lanes of a warp wait for each other.
struct Convergence {
  const char* name = nullptr;  // null: none
  uint32_t site = 0, mask = 0, arrived = 0, generation = 0;
  bool aligned = false;
  Lanes arguments{};
  void (*action)(Warp&, const Lanes&) = nullptr;
};

// One warp's quarter of a wgmma: 16 rows. A lane's accumulators begin as bits of floats, or as tokens of earlier ones.
struct Wgmma {
  Half type;
  uint32_t n;
  uint64_t a, b;
  bool accumulate, executed = false;
  uint32_t token, group;
  std::array<std::array<uint32_t, kMaxAccumulators>, kWarpLanes> values;
  std::array<std::array<bool, kMaxAccumulators>, kWarpLanes> found{};  // in a register, or taken by a later wgmma
};

struct BulkStore {
  const void* tensor_map;
  int32_t column, row;
  uint32_t source, group;
};

struct Warp {
  Cta* cta = nullptr;
  uint32_t index = 0, runnable = 0, exited = 0;  // masks of lanes
  Thread threads[kWarpLanes];
  Knowledge knowledge;
  Convergence convergence;
  uint32_t registers = 0;  // of each thread
  std::deque<std::unique_ptr<Wgmma>> wgmmas;
  uint32_t wgmma_count = 0, wgmma_committed = 0, wgmma_retired = 0, warpgroup_step = 0;
  bool wgmma_fenced = false;
  std::deque<BulkStore> bulk_stores;
  uint32_t bulk_committed = 0, bulk_lane = kWarpLanes;
  uint32_t proxy_fenced = 0;  // lanes that have executed fence.proxy.async since their last store

  uint32_t actor(Kind kind) const;
  uint32_t tick() const { return knowledge.happened[actor(Kind::kWarp)]; }
  // What others may learn from this warp; what it does from now on is not part of it.
  const Knowledge& release(Knowledge& into);
  void acquire(const Knowledge& released) { knowledge.join(released); }
};

struct Mbarrier {
  uint32_t address = 0, count = 0, pending = 0, actor = 0;
  bool live = false, published = false;
  uint32_t init_actor = 0, init_tick = 0;
  int64_t bytes = 0;        // of the phase, announced and not yet here
  uint32_t completed = 0;   // phases since init
  uint32_t first_tick = 0;  // the actor's tick at init
  Knowledge gathered, released;
  std::vector<Thread*> waiting;

  uint32_t tick() const { return first_tick + completed; }
};

struct NamedBarrier {
  uint32_t expected = 0, arrived = 0, generation = 0;
  Knowledge gathered, released;
  std::vector<Thread*> waiting;
};

struct TensorMap;

struct BulkLoad {
  Cta* cta;  // of destination and mbarrier
  const TensorMap* tensor_map;
  int32_t column, row;
  uint32_t destination, mbarrier, phase;
};

struct Cta {
  uint32_t rank = 0, index = 0;  // in the cluster; ctaid
  std::unique_ptr<Warp[]> warps;
  uint32_t num_warps = 0, live_threads = 0;
  uint8_t* shared = nullptr;  // the window
  uint32_t shared_begin = 0, shared_end = 0;
  Shadow shadow;
  std::array<Mbarrier, kMaxMbarriers> mbarriers;
  std::array<NamedBarrier, 16> barriers;
  uint32_t free_registers = 0;
  std::vector<Thread*> waiting_for_registers;
  std::vector<std::vector<uint64_t>> warpgroup_steps;  // what the first warp of each warpgroup did
};

enum class Schedule { kRandom, kStarve, kPriority, kRoundRobin };
enum class Timing { kRandom, kAtOnce, kLate };

struct Range {
  uint64_t begin, end;
};

struct Machine {
  // Set before a launch.
  std::mt19937_64 random;
  Schedule schedule = Schedule::kRandom;
  Timing timing = Timing::kRandom;
  bool strict_mbarriers = true;  // bulk copies need fence.mbarrier_init, not just a barrier
  std::vector<Range> global;     // what kernels may access
  uint64_t stmatrix_conflicts = 0;
  std::string error;

  // Of the running cluster.
  std::vector<std::unique_ptr<Cta>> ctas;
  uint32_t threads = 0, grid = 0, cluster = 1, live_threads = 0;
  NamedBarrier cluster_barrier;
  std::vector<BulkLoad> bulk_loads;
  uint32_t in_flight = 0;            // bulk copies and wgmmas that have been issued, and have not run
  std::vector<uint32_t> priorities;  // of the warps, by the schedule

  bool chance(uint32_t one_in) { return random() % one_in == 0; }
};

extern Machine machine;
extern Thread* self;  // the running thread; null in the scheduler

// ---- scheduler.cpp ----
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
// Suspends the running thread until `wake`.
void suspend(const char* waits_for);
void wake(Thread& thread);
void wake_all(std::vector<Thread*>& waiting);
// Lets others run now and then. Every instruction that others can observe begins with it.
void yield();
// Waits for the lanes of `mask`; the last of them runs `action` for all.
void converge(const char* name, uint32_t mask, bool aligned, void* arguments,
              void (*action)(Warp&, const Lanes&));

// ---- memory.cpp ----
Cta& cta_of(uint32_t& address);  // the CTA of a shared::cluster address, which becomes shared::cta
uint8_t* shared_bytes(Cta& cta, uint32_t address, uint32_t bytes, uint32_t alignment, const char* what);
// An ordinary store of these lanes of the warp.
void store_shared(Warp& warp, uint8_t* memory, const void* value, uint32_t address, uint32_t bytes, uint32_t lanes,
                  const char* what);
void check_global(uint64_t address, uint64_t bytes, const char* what);
// Bits 4 and up of a shared address under a swizzle that repeats over `span` bytes a row: 128, 64, 32; 16 for none.
inline uint32_t swizzle(uint32_t address, uint32_t span) { return address ^ (((address >> 7) & (span / 16 - 1)) << 4); }

// ---- sync.cpp ----
Mbarrier& find_mbarrier(Cta& cta, uint32_t address, const char* what);
void complete_bytes(Cta& cta, uint32_t address, uint32_t phase, uint32_t bytes);

// ---- tma.cpp, wgmma.cpp ----
bool run_one_bulk_load();
bool run_one_bulk_store(Warp& warp);
bool run_one_wgmma(Warp& warp);
void check_all_waited(const Warp& warp);
void check_warpgroups(const Cta& cta);

}  // namespace hopper
