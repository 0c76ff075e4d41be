// Dynamic scheduling of tasks on the caller's thread pool.
#pragma once

#include <atomic>
#include <cstdint>

namespace siglip {

// torch_parallel_for of libtorch's stable ABI, passed as a pointer, so that torch.set_num_threads holds and no torch
// header or library is needed. Null runs everything on the caller's thread.
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, void (*)(int64_t, int64_t, void*), void*);

// Below this many picoseconds of work, waking the other threads costs more than they save.
constexpr int64_t kMinParallelWork = 20'000'000;

// Runs task(0) … task(count - 1) once each. Threads take the next task when they are free, so no result may depend on
// which thread ran it. work: estimated picoseconds of all tasks on one thread.
template <class Task>
void for_each_task(ParallelFor pool, int64_t count, int64_t work, Task&& task) {
  struct Context {
    Task& task;
    int64_t count;
    std::atomic<int64_t> next{0};
  } context{task, count};
  const auto worker = [](int64_t, int64_t, void* pointer) {
    Context& context = *static_cast<Context*>(pointer);
    for (int64_t i; (i = context.next.fetch_add(1, std::memory_order_relaxed)) < context.count;) context.task(i);
  };
  if (pool && count > 1 && work >= kMinParallelWork)
    pool(0, count, 1, worker, &context);
  else
    worker(0, count, &context);
}

}  // namespace siglip
