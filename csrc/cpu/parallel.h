// Tasks over the caller's thread pool.
#pragma once

#include <atomic>
#include <cstdint>

namespace siglip {

// torch_parallel_for of libtorch's stable ABI, handed over as a pointer: torch.set_num_threads is respected and no
// torch header or library is needed. Null runs on the caller's thread.
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, void (*)(int64_t, int64_t, void*), void*);

// Picoseconds of one thread below which waking the others costs more than they save.
constexpr int64_t kWorthwhile = 20'000'000;

// task(0) … task(count - 1), each once. Threads take the next one as they come free, so a task's results must not
// depend on which thread runs it. work: picoseconds of one thread that all tasks take together, about.
template <class Task>
void for_each_task(ParallelFor pool, int64_t count, int64_t work, Task&& task) {
  struct Shared {
    Task& task;
    int64_t count;
    std::atomic<int64_t> next{0};
  } shared{task, count};
  const auto loop = [](int64_t, int64_t, void* context) {
    Shared& shared = *static_cast<Shared*>(context);
    for (int64_t i; (i = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.count;) shared.task(i);
  };
  if (pool && count > 1 && work >= kWorthwhile)
    pool(0, count, 1, loop, &shared);
  else
    loop(0, count, &shared);
}

}  // namespace siglip
