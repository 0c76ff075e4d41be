// Launches: every thread a fiber, chosen by a seeded schedule; asynchronous work done between their steps.

#include <ucontext.h>

#include <cfenv>
#include <cstdarg>
#include <cstdio>

#include "state.h"

namespace hopper {

uint32_t site = 0;

namespace {

constexpr size_t kStackBytes = 512 * 1024;
constexpr uint32_t kRegisterFile = 65'536, kMaxRegisters = 248;  // of an SM; of a thread at launch

jmp_buf scheduler_context, launch_context;
Body body;
void* const* arguments;

// The first function on a fiber's stack.
void run_thread() {
  body(arguments);
  warp().runnable &= ~(1u << self->lane);
  warp().exited |= 1u << self->lane;
  --cta->live_threads;
  if (warp().convergence && warp().convergence->mask >> self->lane & 1)
    fail("a lane exits while others of its warp wait in %s", warp().convergence->name);
  if (!warp().accumulators.empty()) fail("a thread exits with wgmmas that nobody has waited for");
  if (warp().exited == kEveryLane && warp().bulk_issued > warp().tick(kBulkGroups))
    fail("a warp exits while its bulk stores read shared memory");
  if (std::fetestexcept(FE_INVALID)) fail("arithmetic on an accumulator in flight");
  _longjmp(scheduler_context, 1);
}

// Runs the thread until it suspends itself or yields.
void resume(Thread& thread) {
  static uint8_t* const stacks = new uint8_t[kStackBytes * kMaxWarps * kWarpLanes];
  self = &thread;
  if (_setjmp(scheduler_context) == 0) {
    if (thread.started) _longjmp(thread.context, 1);
    thread.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack = {stacks + kStackBytes * tid_x(), 0, kStackBytes};
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
  for (Warp* warp : cta->priorities)
    if (warp->runnable) runnable.push_back(warp);
  if (runnable.empty()) return nullptr;
  size_t chosen = machine.random() % runnable.size();
  if (machine.schedule == Schedule::kPriority) chosen = 0;
  if (machine.schedule == Schedule::kRoundRobin) chosen = turn++ % runnable.size();
  // The last warp runs when no other can.
  if (machine.schedule == Schedule::kStarve && runnable[chosen] == cta->priorities.back()) chosen = 0;
  uint32_t lanes = runnable[chosen]->runnable;
  for (uint32_t skip = machine.random() % __builtin_popcount(lanes); skip; --skip) lanes &= lanes - 1;
  return &runnable[chosen]->threads[__builtin_ctz(lanes)];
}

// Does any one thing that is in flight and may come now: a warp's wgmmas come in order.
bool run_any_async() {
  std::list<Async>& in_flight = cta->in_flight;
  if (in_flight.empty()) return false;
  auto chosen = std::next(in_flight.begin(), machine.random() % in_flight.size());
  const uint32_t actor = chosen->event.actor;
  if (actor / kMaxWarps == kWgmmaGroups)
    chosen = std::find_if(in_flight.begin(), chosen, [&](const Async& one) { return one.event.actor == actor; });
  chosen->run();
  in_flight.erase(chosen);
  return true;
}

[[noreturn]] void fail_deadlock() {
  std::string where;
  for (const Warp* warp : cta->priorities) {
    if (warp->exited == kEveryLane || where.size() >= 600) continue;
    const Thread& thread = warp->threads[__builtin_ctz(~warp->exited)];
    where += "; cta " + std::to_string(cta->index) + " warp " + std::to_string(warp->index) + " lane " +
             std::to_string(thread.lane) + " in " + thread.instruction + " at " + std::to_string(thread.waits_at);
  }
  fail("deadlock%s", where.c_str());
}

void run_cta(uint32_t index, uint32_t shared_bytes, uint32_t misalignment) {
  const uint32_t registers = std::min(kMaxRegisters, kRegisterFile / machine.threads / 8 * 8);  // of a thread
  const uint32_t begin = kReservedShared + misalignment, free = kRegisterFile - registers * machine.threads;
  cta.reset(new Cta{index, machine.threads, begin, begin + shared_bytes, free});
  std::fill_n(cta->shared, kWindowBytes, 0xff);  // NaN in every format
  for (uint32_t w = 0; w < machine.threads / kWarpLanes; ++w)
    cta->priorities.push_back(&cta->warps.emplace_back(w, registers));
  std::shuffle(cta->priorities.begin(), cta->priorities.end(), machine.random);
  while (cta->live_threads || !cta->in_flight.empty()) {
    while (machine.timing == Timing::kAtOnce && run_any_async()) continue;
    if (machine.timing == Timing::kRandom && machine.random() % 8 == 0) run_any_async();
    if (Thread* const thread = choose_thread())
      resume(*thread);
    else if (!run_any_async())
      fail_deadlock();
  }
  for (const Warp& warp : cta->warps)
    if (warp.wgmma_history != cta->warps[warp.index / kWarpgroupWarps * kWarpgroupWarps].wgmma_history)
      fail("wgmma: the warps of a warpgroup differ");
}

}  // namespace

void fail(const char* format, ...) {
  char text[1300];
  int begun = 0;
  if (self)
    begun = std::sprintf(text, "cta %u warp %u lane %u at %u: %s%s", cta->index, warp().index, self->lane, site,
                         self->instruction, *self->instruction ? ": " : "");
  va_list values;
  va_start(values, format);
  std::vsnprintf(text + begun, sizeof text - begun, format, values);
  va_end(values);
  machine.error = text;
  self = nullptr;
  _longjmp(launch_context, 1);
}

Instruction::Instruction(const char* name) {
  self->instruction = name;
  if (machine.random() % 4 == 0) leave();
}

void suspend(std::vector<Thread*>& waiting) {
  waiting.push_back(self);
  warp().runnable &= ~(1u << self->lane);
  leave();
}

void wake(std::vector<Thread*>& waiting) {
  for (Thread* thread : waiting) thread->warp->runnable |= 1u << thread->lane;
  waiting.clear();
}

void wait_groups(Kind kind, uint32_t pending) {
  const uint32_t last = warp().committed[kind] - std::min(pending, warp().committed[kind]);
  cta->in_flight.remove_if([&](const Async& async) {
    const bool is_of_them = async.event.actor == actor(kind, warp().index) && async.event.tick <= last;
    if (is_of_them) async.run();
    return is_of_them;
  });
  warp().tick(kind) = std::max(warp().tick(kind), last);
}

uint32_t tid_x() { return warp().index * kWarpLanes + self->lane; }
uint32_t ntid_x() { return machine.threads; }
uint32_t ctaid_x() { return cta->index; }
uint32_t nctaid_x() { return machine.grid; }

}  // namespace hopper

using namespace hopper;

extern "C" {

int hopper_launch(Body kernel, uint32_t grid, uint32_t threads, uint32_t shared_bytes, uint32_t misalignment,
                  void* const* kernel_arguments) {
  body = kernel;
  arguments = kernel_arguments;
  site = 0;
  machine.grid = grid;
  machine.threads = threads;
  std::feclearexcept(FE_ALL_EXCEPT);
  if (_setjmp(launch_context) != 0) return -1;
  if (!grid || !threads || threads % kWarpLanes || threads > kMaxWarps * kWarpLanes ||
      shared_bytes + misalignment > kSharedBytes)
    fail("a launch that is not possible");
  for (uint32_t index = 0; index < grid; ++index) run_cta(index, shared_bytes, misalignment);
  return 0;
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
