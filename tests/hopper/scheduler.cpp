// Launches: every thread a fiber, chosen by a seeded schedule; asynchronous work done between their steps.

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cfenv>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "state.h"

namespace hopper {

Machine machine;
Thread* self = nullptr;
uint32_t site = 0;

namespace {

constexpr size_t kStackBytes = 512 * 1024;
constexpr uint32_t kRegisterFile = 65'536, kMaxRegisters = 248;  // of an SM; of a thread at launch

jmp_buf scheduler_context, launch_context;
Body body;
void* const* arguments;

uint8_t* stack_of(const Thread& thread) {
  static uint8_t* const stacks = static_cast<uint8_t*>(
      mmap(nullptr, kStackBytes * kMaxCtas * kMaxWarps * kWarpLanes, PROT_READ | PROT_WRITE,
           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  return stacks + kStackBytes * (thread.warp->cta->rank * kMaxWarps * kWarpLanes + thread.index);
}

void exit_thread(Thread& thread) {
  Warp& warp = *thread.warp;
  thread.exited = true;
  warp.runnable &= ~(1u << thread.lane);
  warp.exited |= 1u << thread.lane;
  --warp.cta->live_threads;
  --machine.live_threads;
  if (warp.convergence.name && warp.convergence.mask >> thread.lane & 1)
    fail("a lane exits while others of its warp wait in %s", warp.convergence.name);
  if (!warp.wgmmas.empty()) fail("a thread exits with wgmmas that nobody has waited for");
  if (warp.exited == kEveryLane && warp.bulk_issued > warp.tick(Kind::kBulkGroups))
    fail("a warp exits while its bulk stores read shared memory");
  if (std::fetestexcept(FE_INVALID)) fail("arithmetic on an accumulator in flight");
}

// The first function on a fiber's stack.
void run_thread() {
  body(arguments);
  exit_thread(*self);
  _longjmp(scheduler_context, 1);
}

// Runs the thread until it suspends itself or yields.
void resume(Thread& thread) {
  self = &thread;
  if (_setjmp(scheduler_context) == 0) {
    if (thread.started) _longjmp(thread.context, 1);
    thread.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack_of(thread);
    context.uc_stack.ss_size = kStackBytes;
    makecontext(&context, run_thread, 0);
    setcontext(&context);
  }
  self = nullptr;
}

void leave() {
  self->waits_at = site;
  if (_setjmp(self->context) == 0) _longjmp(scheduler_context, 1);
  site = self->waits_at;
}

// A thread that can run; null if there is none.
Thread* choose_thread() {
  static std::vector<Warp*> runnable;
  static uint32_t turn = 0;
  runnable.clear();
  for (Warp* warp : machine.warps)
    if (warp->runnable) runnable.push_back(warp);
  if (runnable.empty()) return nullptr;
  size_t chosen = machine.random() % runnable.size();
  if (machine.schedule == Schedule::kPriority) chosen = 0;
  if (machine.schedule == Schedule::kRoundRobin) chosen = turn++ % runnable.size();
  // The last warp runs when no other can.
  if (machine.schedule == Schedule::kStarve && runnable[chosen] == machine.warps.back()) chosen = 0;
  uint32_t lanes = runnable[chosen]->runnable;
  for (uint32_t skip = machine.random() % __builtin_popcount(lanes); skip; --skip) lanes &= lanes - 1;
  return &runnable[chosen]->threads[__builtin_ctz(lanes)];
}

// Does any one thing that is in flight and may come now.
bool run_any_async() {
  if (machine.in_flight.empty()) return false;
  const Async& chosen = machine.in_flight[machine.random() % machine.in_flight.size()];
  const Warp* const warp = chosen.warp;
  const bool in_order = chosen.in_order;
  return run_async([&](const Async& async) {
    return in_order ? async.in_order && async.warp == warp : &async == &chosen;
  });
}

[[noreturn]] void fail_deadlock() {
  std::string where;
  for (const Warp* warp : machine.warps)
    for (const Thread& thread : warp->threads)
      if (!thread.exited && thread.lane == uint32_t(__builtin_ctz(~warp->exited)) && where.size() < 600)
        where += "; cta " + std::to_string(warp->cta->index) + " warp " + std::to_string(warp->index) + " lane " +
                 std::to_string(thread.lane) + " in " + thread.waits_for + " at " + std::to_string(thread.waits_at);
  fail("deadlock%s", where.c_str());
}

void run_cluster() {
  while (machine.live_threads) {
    if (machine.timing == Timing::kAtOnce)
      while (run_any_async()) {
      }
    else if (machine.timing == Timing::kRandom && machine.chance(8))
      run_any_async();
    if (Thread* const thread = choose_thread())
      resume(*thread);
    else if (!run_any_async())
      fail_deadlock();
  }
  while (run_any_async()) {
  }
  for (const auto& cta : machine.ctas) check_warpgroups(*cta);
}

void start_cta(uint32_t rank, uint32_t index, uint32_t shared_bytes, uint32_t misalignment) {
  static uint8_t* const windows = static_cast<uint8_t*>(std::aligned_alloc(1024, kMaxCtas * kWindowBytes));
  machine.ctas.push_back(std::make_unique<Cta>());
  Cta& cta = *machine.ctas.back();
  cta.rank = rank;
  cta.index = index;
  cta.num_warps = machine.threads / kWarpLanes;
  cta.live_threads = machine.threads;
  cta.shared = windows + rank * kWindowBytes;
  std::memset(cta.shared, 0xff, kWindowBytes);  // NaN in every format
  cta.shared_begin = kReservedShared + misalignment;
  cta.shared_end = cta.shared_begin + shared_bytes;
  cta.shadow.reset(rank, kWindowBytes);
  cta.warps = std::make_unique<Warp[]>(cta.num_warps);
  cta.warpgroup_wgmmas.resize((cta.num_warps + kWarpgroupWarps - 1) / kWarpgroupWarps);
  const uint32_t registers = std::min(kMaxRegisters, kRegisterFile / machine.threads / 8 * 8);  // of a thread
  cta.free_registers = kRegisterFile - registers * machine.threads;
  for (uint32_t m = 0; m < kMaxMbarriers; ++m) cta.mbarriers[m].actor = actor(rank, Kind::kMbarrier, m);
  for (uint32_t w = 0; w < cta.num_warps; ++w) {
    Warp& warp = cta.warps[w];
    warp.cta = &cta;
    warp.index = w;
    warp.tick(Kind::kWarp) = 1;
    for (uint32_t lane = 0; lane < kWarpLanes; ++lane) {
      warp.threads[lane].warp = &warp;
      warp.threads[lane].lane = lane;
      warp.threads[lane].index = w * kWarpLanes + lane;
      warp.threads[lane].registers = registers;
    }
    machine.warps.push_back(&warp);
  }
}

}  // namespace

void fail(const char* format, ...) {
  char text[1200], place[80] = "";
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof text, format, values);
  va_end(values);
  if (self)
    std::snprintf(place, sizeof place, "cta %u warp %u lane %u at %u: ", self->warp->cta->index, self->warp->index,
                  self->lane, site);
  machine.error = std::string(place) + text;
  _longjmp(launch_context, 1);
}

void suspend(const char* waits_for, std::vector<Thread*>& waiting) {
  self->waits_for = waits_for;
  waiting.push_back(self);
  self->warp->runnable &= ~(1u << self->lane);
  leave();
}

void wake(std::vector<Thread*>& waiting) {
  for (Thread* thread : waiting) thread->warp->runnable |= 1u << thread->lane;
  waiting.clear();
}

void yield() {
  if (machine.chance(4)) leave();
}

void converge(const char* name, uint32_t mask, bool aligned, void* lane_arguments, Action action) {
  yield();
  Warp& warp = *self->warp;
  Convergence& now = warp.convergence;
  if (!(mask >> self->lane & 1)) fail("%s: its mask %x lacks the executing lane", name, mask);
  if (mask & warp.exited) fail("%s: lanes %x have exited", name, mask & warp.exited);
  if (!now.name)
    now = {name, site, mask, 0, now.generation, now.arguments};
  else if (now.name != name || now.mask != mask || (aligned && now.site != site))
    fail("divergent: %s, while lanes %x wait in %s at %u", name, now.arrived, now.name, now.site);
  now.arguments[self->lane] = lane_arguments;
  now.arrived |= 1u << self->lane;
  if (now.arrived == mask) {
    action(warp, now.arguments);
    ++now.generation;
    now.name = nullptr;
    warp.runnable |= mask;
    return;
  }
  std::vector<Thread*> nobody;
  for (const uint32_t generation = now.generation; now.generation == generation;) suspend(name, nobody);
}

bool run_async(const std::function<bool(const Async&)>& fits) {
  const auto found = std::find_if(machine.in_flight.begin(), machine.in_flight.end(), fits);
  if (found == machine.in_flight.end()) return false;
  const Async async = std::move(*found);
  machine.in_flight.erase(found);
  async.run();
  return true;
}

uint32_t Warp::actor(Kind kind) const { return hopper::actor(cta->rank, kind, index); }

void Warp::release(Knowledge& into) {
  into.join(knowledge);
  ++tick(Kind::kWarp);
}

uint32_t tid_x() { return self->index; }
uint32_t ntid_x() { return machine.threads; }
uint32_t ctaid_x() { return self->warp->cta->index; }
uint32_t nctaid_x() { return machine.grid; }
uint32_t cluster_ctarank() { return self->warp->cta->rank; }
uint32_t cluster_nctarank() { return machine.cluster; }

}  // namespace hopper

using namespace hopper;

extern "C" {

int hopper_launch(Body kernel, uint32_t grid, uint32_t threads, uint32_t cluster, uint32_t shared_bytes,
                  uint32_t misalignment, void* const* kernel_arguments) {
  machine.error = "a launch that is not possible";
  if (!grid || grid % cluster || cluster > kMaxCtas || !threads || threads % kWarpLanes ||
      threads > kMaxWarps * kWarpLanes || shared_bytes + misalignment > kSharedBytes)
    return -1;
  body = kernel;
  arguments = kernel_arguments;
  site = 0;
  machine.grid = grid;
  machine.threads = threads;
  machine.cluster = cluster;
  std::feclearexcept(FE_ALL_EXCEPT);
  const bool failed = _setjmp(launch_context) != 0;
  for (uint32_t first = 0; first < grid && !failed; first += cluster) {
    machine.in_flight.clear();
    machine.warps.clear();
    machine.ctas.clear();
    machine.cluster_barrier = {};
    machine.live_threads = cluster * threads;
    for (uint32_t rank = 0; rank < cluster; ++rank) start_cta(rank, first + rank, shared_bytes, misalignment);
    std::shuffle(machine.warps.begin(), machine.warps.end(), machine.random);
    run_cluster();
  }
  self = nullptr;
  return failed ? -1 : 0;
}

const char* hopper_error() { return machine.error.c_str(); }
uint64_t hopper_stmatrix_conflicts() { return machine.stmatrix_conflicts; }

void hopper_configure(uint64_t seed, int32_t schedule, int32_t timing, int32_t strict_mbarriers) {
  machine.seed = seed;
  machine.random.seed(seed);
  machine.schedule = Schedule(schedule);
  machine.timing = Timing(timing);
  machine.strict_mbarriers = strict_mbarriers != 0;
}

// What kernels may read and write; none: everything.
void hopper_allow(uint64_t address, uint64_t bytes) { machine.global.push_back({address, address + bytes}); }
void hopper_forget() { machine.global.clear(); }
int hopper_is_restricted() { return !machine.global.empty(); }

}  // extern "C"
