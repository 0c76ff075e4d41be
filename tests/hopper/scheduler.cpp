// Launches: every thread a fiber, chosen by a seeded schedule; asynchronous work done between their steps.

#include <sys/mman.h>

#include <cfenv>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "state.h"

namespace hopper {

Machine machine;
Thread* self = nullptr;
uint32_t site = 0;

namespace {

constexpr size_t kStackBytes = 512 * 1024;
constexpr uint32_t kRegisterFile = 65'536, kRegisterUnit = 8, kMaxRegisters = 248;

jmp_buf scheduler_context, launch_context;
Body body;
void* const* arguments;

uint8_t* stacks() {
  static uint8_t* const memory = [] {
    void* const pages = mmap(nullptr, kStackBytes * kMaxCtas * kMaxWarps * kWarpLanes, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) std::abort();
    return static_cast<uint8_t*>(pages);
  }();
  return memory;
}

void exit_thread(Thread& thread) {
  Warp& warp = *thread.warp;
  Cta& cta = *warp.cta;
  thread.exited = true;
  warp.runnable &= ~(1u << thread.lane);
  warp.exited |= 1u << thread.lane;
  --cta.live_threads;
  --machine.live_threads;
  if (warp.convergence.name && warp.convergence.mask >> thread.lane & 1)
    fail("a lane exits while others of its warp wait in %s", warp.convergence.name);
  if (warp.exited == kEveryLane) check_all_waited(warp);
  if (std::fetestexcept(FE_INVALID)) fail("arithmetic on an accumulator in flight, or on a register nobody has set");
}

// The first function on a fiber's stack.
void run_thread() {
  body(arguments);
  exit_thread(*self);
  _longjmp(scheduler_context, 1);
}

// Runs the thread until it suspends itself or yields.
void resume(Thread& thread, uint32_t number) {
  self = &thread;
  if (_setjmp(scheduler_context) == 0) {
    if (thread.started) _longjmp(thread.context, 1);
    thread.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks() + kStackBytes * number;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, run_thread, 0);
    setcontext(&context);
  }
  self = nullptr;
}

void leave() {
  Thread& thread = *self;
  thread.waits_at = site;
  if (_setjmp(thread.context) == 0) _longjmp(scheduler_context, 1);
  site = thread.waits_at;
}

uint32_t number_of(const Warp& warp) { return warp.cta->rank * warp.cta->num_warps + warp.index; }

// The next warp with a runnable lane; null if there is none.
Warp* choose_warp() {
  static std::vector<Warp*> runnable;
  runnable.clear();
  for (auto& cta : machine.ctas)
    for (uint32_t w = 0; w < cta->num_warps; ++w)
      if (cta->warps[w].runnable) runnable.push_back(&cta->warps[w]);
  if (runnable.empty()) return nullptr;
  const auto by_priority = [](const Warp* a, const Warp* b) {
    return machine.priorities[number_of(*a)] < machine.priorities[number_of(*b)];
  };
  switch (machine.schedule) {
    case Schedule::kPriority: return *std::min_element(runnable.begin(), runnable.end(), by_priority);
    case Schedule::kStarve: {  // the warp of the lowest priority runs when no other can
      const auto victim = std::max_element(runnable.begin(), runnable.end(), by_priority);
      if (runnable.size() > 1 && machine.priorities[number_of(**victim)] + 1 == machine.priorities.size())
        runnable.erase(victim);
      break;
    }
    case Schedule::kRoundRobin: {
      static uint32_t turn = 0;
      return runnable[turn++ % runnable.size()];
    }
    case Schedule::kRandom: break;
  }
  return runnable[machine.random() % runnable.size()];
}

uint32_t choose_lane(uint32_t runnable) {
  uint32_t skip = machine.schedule == Schedule::kRoundRobin ? 0 : machine.random() % __builtin_popcount(runnable);
  while (skip--) runnable &= runnable - 1;
  return __builtin_ctz(runnable);
}

// Does one thing that is in flight, any; false if nothing is.
bool run_one_async() {
  if (!machine.in_flight) return false;
  std::vector<Warp*> warps;
  for (auto& cta : machine.ctas)
    for (uint32_t w = 0; w < cta->num_warps; ++w) warps.push_back(&cta->warps[w]);
  const uint32_t kinds = 2 * uint32_t(warps.size()) + 1, first = machine.random() % kinds;
  for (uint32_t i = 0; i < kinds; ++i) {
    const uint32_t kind = (first + i) % kinds;
    if (kind == 0 ? run_one_bulk_load()
                  : kind % 2 ? run_one_wgmma(*warps[kind / 2]) : run_one_bulk_store(*warps[kind / 2 - 1]))
      return true;
  }
  return false;
}

[[noreturn]] void fail_deadlock() {
  std::string where;
  for (auto& cta : machine.ctas)
    for (uint32_t w = 0; w < cta->num_warps; ++w)
      for (const Thread& thread : cta->warps[w].threads)
        if (!thread.exited && where.size() < 600) {
          char line[120];
          std::snprintf(line, sizeof line, "; cta %u warp %u lane %u in %s at %u", cta->index, w, thread.lane,
                        thread.waits_for, thread.waits_at);
          where += line;
          break;  // one lane a warp says enough
        }
  fail("deadlock%s", where.c_str());
}

void run_cluster() {
  while (machine.live_threads) {
    if (machine.timing == Timing::kAtOnce)
      while (run_one_async()) {
      }
    else if (machine.timing == Timing::kRandom && machine.chance(8))
      run_one_async();
    Warp* const warp = choose_warp();
    if (!warp) {
      if (!run_one_async()) fail_deadlock();
      continue;
    }
    const uint32_t lane = choose_lane(warp->runnable);
    resume(warp->threads[lane], number_of(*warp) * kWarpLanes + lane);
  }
  while (run_one_async()) {
  }
  for (const auto& cta : machine.ctas) check_warpgroups(*cta);
}

void start_cta(Cta& cta, uint32_t rank, uint32_t index, uint32_t shared_bytes, uint32_t misalignment) {
  cta.rank = rank;
  cta.index = index;
  cta.num_warps = machine.threads / kWarpLanes;
  cta.live_threads = machine.threads;
  cta.warps = std::make_unique<Warp[]>(cta.num_warps);
  static uint8_t* const windows = static_cast<uint8_t*>(std::aligned_alloc(1024, kMaxCtas * kWindowBytes));
  cta.shared = windows + rank * kWindowBytes;
  for (uint32_t i = 0; i < kWindowBytes; ++i) cta.shared[i] = uint8_t(0xff);  // NaN in every format
  cta.shared_begin = kReservedShared + misalignment;
  cta.shared_end = cta.shared_begin + shared_bytes;
  cta.shadow.reset(rank, kWindowBytes);
  const uint32_t registers =
      std::min(kMaxRegisters, kRegisterFile / machine.threads / kRegisterUnit * kRegisterUnit);
  cta.free_registers = kRegisterFile - registers * machine.threads;
  cta.warpgroup_steps.resize((cta.num_warps + kWarpgroupWarps - 1) / kWarpgroupWarps);
  for (uint32_t m = 0; m < kMaxMbarriers; ++m) cta.mbarriers[m].actor = actor(rank, Kind::kMbarrier, m);
  for (uint32_t w = 0; w < cta.num_warps; ++w) {
    Warp& warp = cta.warps[w];
    warp.cta = &cta;
    warp.index = w;
    warp.runnable = kEveryLane;
    warp.registers = registers;
    warp.knowledge.happened[warp.actor(Kind::kWarp)] = 1;
    for (uint32_t lane = 0; lane < kWarpLanes; ++lane) {
      warp.threads[lane].warp = &warp;
      warp.threads[lane].lane = lane;
    }
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

void suspend(const char* waits_for) {
  self->waits_for = waits_for;
  self->warp->runnable &= ~(1u << self->lane);
  leave();
  self->waits_for = "";
}

void wake(Thread& thread) { thread.warp->runnable |= 1u << thread.lane; }

void wake_all(std::vector<Thread*>& waiting) {
  for (Thread* thread : waiting) wake(*thread);
  waiting.clear();
}

void yield() {
  if (machine.chance(4)) leave();
}

void converge(const char* name, uint32_t mask, bool aligned, void* lane_arguments,
              void (*action)(Warp&, const Lanes&)) {
  yield();
  Warp& warp = *self->warp;
  Convergence& now = warp.convergence;
  const uint32_t bit = 1u << self->lane;
  if (!(mask & bit)) fail("%s: its mask %x lacks the executing lane", name, mask);
  if (mask & warp.exited) fail("%s: lanes %x have exited", name, mask & warp.exited);
  if (!now.name)
    now = {name, site, mask, 0, now.generation, aligned, now.arguments, action};
  else if (now.name != name || now.mask != mask || (aligned && now.site != site))
    fail("divergent: %s, while lanes %x wait in %s at %u", name, now.arrived, now.name, now.site);
  now.arguments[self->lane] = lane_arguments;
  now.arrived |= bit;
  if (now.arrived != mask) {
    const uint32_t generation = now.generation;
    while (now.generation == generation) suspend(name);
    return;
  }
  action(warp, now.arguments);
  ++now.generation;
  now.name = nullptr;
  for (Thread& thread : warp.threads)
    if (mask >> thread.lane & 1) wake(thread);
}

uint32_t Thread::index() const { return warp->index * kWarpLanes + lane; }
uint32_t Warp::actor(Kind kind) const { return hopper::actor(cta->rank, kind, index); }

const Knowledge& Warp::release(Knowledge& into) {
  into.join(knowledge);
  ++knowledge.happened[actor(Kind::kWarp)];
  return into;
}

uint32_t tid_x() { return self->index(); }
uint32_t ntid_x() { return machine.threads; }
uint32_t ctaid_x() { return self->warp->cta->index; }
uint32_t nctaid_x() { return machine.grid; }
uint32_t cluster_ctarank() { return self->warp->cta->rank; }
uint32_t cluster_nctarank() { return machine.cluster; }

}  // namespace hopper

using namespace hopper;

#define HOPPER_EXPORT extern "C" __attribute__((visibility("default")))

// Runs a kernel to its end; 0, or -1 with a message in hopper_error. `shared_bytes`: dynamic shared memory, which
// begins `misalignment` bytes after a multiple of 1024.
HOPPER_EXPORT int hopper_launch(Body kernel, uint32_t grid, uint32_t threads, uint32_t cluster, uint32_t shared_bytes,
                                uint32_t misalignment, void* const* kernel_arguments) {
  machine.error.clear();
  if (!grid || grid % cluster || cluster > kMaxCtas || !threads || threads % kWarpLanes ||
      threads > kMaxWarps * kWarpLanes || shared_bytes + misalignment > kSharedBytes) {
    machine.error = "a launch that is not possible";
    return -1;
  }
  body = kernel;
  arguments = kernel_arguments;
  machine.grid = grid;
  machine.threads = threads;
  machine.cluster = cluster;
  std::feclearexcept(FE_ALL_EXCEPT);
  const bool failed = _setjmp(launch_context) != 0;
  if (!failed)
    for (uint32_t first = 0; first < grid; first += cluster) {
      machine.ctas.clear();
      machine.bulk_loads.clear();
      machine.cluster_barrier = {};
      machine.live_threads = cluster * threads;
      machine.in_flight = 0;
      machine.priorities.resize(cluster * threads / kWarpLanes);
      for (uint32_t i = 0; i < machine.priorities.size(); ++i) machine.priorities[i] = i;
      std::shuffle(machine.priorities.begin(), machine.priorities.end(), machine.random);
      for (uint32_t rank = 0; rank < cluster; ++rank) {
        machine.ctas.push_back(std::make_unique<Cta>());
        start_cta(*machine.ctas.back(), rank, first + rank, shared_bytes, misalignment);
      }
      run_cluster();
    }
  self = nullptr;
  machine.ctas.clear();
  return failed ? -1 : 0;
}

HOPPER_EXPORT const char* hopper_error() { return machine.error.c_str(); }

HOPPER_EXPORT void hopper_configure(uint64_t seed, int32_t schedule, int32_t timing, int32_t strict_mbarriers) {
  machine.random.seed(seed);
  machine.schedule = Schedule(schedule);
  machine.timing = Timing(timing);
  machine.strict_mbarriers = strict_mbarriers != 0;
}

// What kernels may read and write; none: everything.
HOPPER_EXPORT void hopper_allow(uint64_t address, uint64_t bytes) { machine.global.push_back({address, address + bytes}); }
HOPPER_EXPORT void hopper_forget() { machine.global.clear(); }
HOPPER_EXPORT uint64_t hopper_stmatrix_conflicts() { return machine.stmatrix_conflicts; }
