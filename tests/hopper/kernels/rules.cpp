// Kernels that break a rule of the machine, or keep it. args[0] is an array of the test's.
#include "machine.h"

using namespace hopper;

#define KERNEL(name) extern "C" void kernel_##name([[maybe_unused]] void* const* args)

KERNEL(race) {
  const uint32_t shared = dynamic_shared();
  const uint32_t one = 1;
  uint32_t got;
  if (tid_x() == 0) st_shared(shared, &one, 4);
  if (tid_x() == 32) ld_shared(shared, &got, 4);
}

KERNEL(race_of_stores) {
  const uint32_t shared = dynamic_shared();
  const uint32_t v = tid_x();
  if (tid_x() % 32 == 0) st_shared(shared, &v, 4);
}

KERNEL(same_value) {
  const uint32_t shared = dynamic_shared();
  const uint32_t v = 7;
  if (tid_x() % 32 == 0) st_shared(shared, &v, 4);
}

KERNEL(overwrite) {
  const uint32_t shared = dynamic_shared();
  uint32_t v = tid_x();
  if (v == 0) st_shared(shared, &v, 4);
  bar_sync(0, 0);
  if (v == 0) ld_shared(shared, &v, 4);
  if (v == 32) st_shared(shared, &v, 4);
}

KERNEL(barrier) {
  const uint32_t shared = dynamic_shared();
  const uint64_t out = reinterpret_cast<uint64_t>(args[0]);
  const uint32_t one = 1;
  uint32_t got;
  if (tid_x() == 0) st_shared(shared, &one, 4);
  bar_sync(0, 0);
  if (tid_x() == 32) {
    ld_shared(shared, &got, 4);
    st_global(out, &got, 4);
  }
}

KERNEL(unwritten) {
  const uint32_t shared = dynamic_shared();
  uint32_t got;
  ld_shared(shared + 64, &got, 4);
}

KERNEL(misaligned) {
  const uint32_t shared = dynamic_shared();
  uint64_t got;
  ld_shared(shared + 4, &got, 8);
}

KERNEL(out_of_shared) {
  const uint32_t shared = dynamic_shared();
  uint32_t got;
  ld_shared(shared + 4096, &got, 4);
}

KERNEL(out_of_global) {
  const uint64_t out = reinterpret_cast<uint64_t>(args[0]);
  uint32_t got;
  ld_global(out + 4096, &got, 4);
}

KERNEL(divergent) {
  const uint32_t lane = tid_x() % 32;
  if (lane < 16) wgmma_fence();
  else wgmma_commit_group();
}

KERNEL(exited_lane) {
  const uint32_t lane = tid_x() % 32;
  if (lane) vote_any(true, ~0u);
}

KERNEL(partial_vote) {
  const uint32_t lane = tid_x() % 32;
  const uint64_t out = reinterpret_cast<uint64_t>(args[0]);
  const uint32_t got = lane < 8 ? vote_all(lane < 8, 0xff) : 1;
  st_global(out + 4 * lane, &got, 4);
}

KERNEL(foreign_mask) {
  vote_any(true, 1);
}

KERNEL(shuffles) {
  const uint32_t lane = tid_x() % 32;
  const uint64_t out = reinterpret_cast<uint64_t>(args[0]);
  const uint32_t got = shfl_bfly(lane, 5, 31, ~0u) + 100 * shfl_idx(lane, 3, 31, ~0u);
  st_global(out + 4 * lane, &got, 4);
}

KERNEL(elect) {
  const uint32_t lane = tid_x() % 32;
  const uint64_t out = reinterpret_cast<uint64_t>(args[0]);
  uint32_t leader;
  const uint32_t got = elect_sync(~0u, leader) + 10 * leader;
  st_global(out + 4 * lane, &got, 4);
}

KERNEL(too_many_arrivals) {
  const uint32_t shared = dynamic_shared();
  if (tid_x() == 0) {
    mbarrier_init(shared, 2);
    mbarrier_arrive_expect_tx(shared, 16);
    mbarrier_arrive(shared);
    mbarrier_arrive(shared);
  }
}

KERNEL(never_arrives) {
  const uint32_t shared = dynamic_shared();
  if (tid_x() == 0) {
    mbarrier_init(shared, 1);
  while (!mbarrier_try_wait_parity(shared, 0)) {} }
}

KERNEL(no_mbarrier) {
  const uint32_t shared = dynamic_shared();
  mbarrier_arrive(shared);
}

KERNEL(second_init) {
  const uint32_t shared = dynamic_shared();
  if (tid_x() == 0) {
    mbarrier_init(shared, 1);
    mbarrier_init(shared, 1);
  }
}

KERNEL(store_over_mbarrier) {
  const uint32_t shared = dynamic_shared();
  const uint32_t v = 0;
  if (tid_x() == 0) {
    mbarrier_init(shared, 1);
    st_shared(shared, &v, 4);
  }
}

KERNEL(unordered_mbarrier) {
  const uint32_t shared = dynamic_shared();
  if (tid_x() == 0) mbarrier_init(shared, 1);
  if (tid_x() == 32) while (true) mbarrier_arrive(shared);
}

KERNEL(mbarrier_orders) {
  const uint32_t shared = dynamic_shared();
  const uint64_t out = reinterpret_cast<uint64_t>(args[0]);
  const uint32_t one = 1;
  uint32_t got;
  if (tid_x() == 0) mbarrier_init(shared, 1);
  bar_sync(0, 0);
  if (tid_x() == 0) {
    st_shared(shared + 64, &one, 4);
    mbarrier_arrive(shared);
  }
  if (tid_x() == 32) {
    while (!mbarrier_try_wait_parity(shared, 0)) {} ld_shared(shared + 64, &got, 4);
    st_global(out, &got, 4);
  }
}

KERNEL(unequal_barriers) {
  bar_sync(1, tid_x() < 32 ? 64 : 32);
}

KERNEL(too_few_registers) {
  setmaxnreg_inc(232);
}

KERNEL(registers) {
  if (tid_x() < 128) setmaxnreg_dec(40);
  else setmaxnreg_inc(232);
}

KERNEL(wrong_registers) {
  setmaxnreg_dec(100);
}

// One warp of the warpgroup multiplies once more.
KERNEL(unequal_wgmmas) {
  const uint32_t shared = dynamic_shared(), zero = 0;
  const uint64_t rows = shared >> 4;  // the same eight, again and again
  uint32_t registers[4]{}, *const accumulators[] = {&registers[0], &registers[1], &registers[2], &registers[3]};
  track_registers(registers, 4);
  if (tid_x() < 32) st_shared(shared + 4 * tid_x(), &zero, 4);
  fence_proxy_async();
  bar_sync(0, 0);
  wgmma_fence();
  for (uint32_t i = 0; i < (tid_x() < 96 ? 1 : 2); ++i) wgmma(Half::kFloat16, 8, accumulators, rows, rows, true);
  wgmma_commit_group();
  wgmma_wait_group(0);
}

KERNEL(no_tensor_map) {
  alignas(64) static int map[32];
  prefetch_tensormap(reinterpret_cast<uint64_t>(map));
}
