// Kernels that break a rule of the machine, or keep it. args[0] is an array of the test's.
#include "machine.h"

using namespace hopper;

static void race(void* const*) {
  const uint32_t shared = dynamic_shared();
  const uint32_t one = 1;
  uint32_t got;
  if (tid_x() == 0) st_shared(shared, &one, 4);
  if (tid_x() == 32) ld_shared(shared, &got, 4);
}

static void race_of_stores(void* const*) {
  const uint32_t shared = dynamic_shared();
  const uint32_t v = tid_x();
  if (tid_x() % 32 == 0) st_shared(shared, &v, 4);
}

static void same_value(void* const*) {
  const uint32_t shared = dynamic_shared();
  const uint32_t v = 7;
  if (tid_x() % 32 == 0) st_shared(shared, &v, 4);
}

static void overwrite(void* const*) {
  const uint32_t shared = dynamic_shared();
  uint32_t v = tid_x();
  if (v == 0) st_shared(shared, &v, 4);
  bar_sync(0, 0);
  if (v == 0) ld_shared(shared, &v, 4);
  if (v == 32) st_shared(shared, &v, 4);
}

static void barrier(void* const* args) {
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

static void unwritten(void* const*) {
  const uint32_t shared = dynamic_shared();
  uint32_t got;
  ld_shared(shared + 64, &got, 4);
}

static void misaligned(void* const*) {
  const uint32_t shared = dynamic_shared();
  uint64_t got;
  ld_shared(shared + 4, &got, 8);
}

static void out_of_shared(void* const*) {
  const uint32_t shared = dynamic_shared();
  uint32_t got;
  ld_shared(shared + 4096, &got, 4);
}

static void out_of_global(void* const* args) {
  const uint64_t out = reinterpret_cast<uint64_t>(args[0]);
  uint32_t got;
  ld_global(out + 4096, &got, 4);
}

static void divergent(void* const*) {
  const uint32_t lane = tid_x() % 32;
  if (lane < 16) wgmma_fence();
  else wgmma_commit_group();
}

static void exited_lane(void* const*) {
  const uint32_t lane = tid_x() % 32;
  if (lane) vote_any(true, ~0u);
}

static void partial_vote(void* const* args) {
  const uint32_t lane = tid_x() % 32;
  const uint64_t out = reinterpret_cast<uint64_t>(args[0]);
  const uint32_t got = lane < 8 ? vote_all(lane < 8, 0xff) : 1;
  st_global(out + 4 * lane, &got, 4);
}

static void foreign_mask(void* const*) {
  vote_any(true, 1);
}

static void shuffles(void* const* args) {
  const uint32_t lane = tid_x() % 32;
  const uint64_t out = reinterpret_cast<uint64_t>(args[0]);
  const uint32_t got = shfl_bfly(lane, 5, 31, ~0u) + 100 * shfl_idx(lane, 3, 31, ~0u);
  st_global(out + 4 * lane, &got, 4);
}

static void elect(void* const* args) {
  const uint32_t lane = tid_x() % 32;
  const uint64_t out = reinterpret_cast<uint64_t>(args[0]);
  uint32_t leader;
  const uint32_t got = elect_sync(~0u, leader) + 10 * leader;
  st_global(out + 4 * lane, &got, 4);
}

static void too_many_arrivals(void* const*) {
  const uint32_t shared = dynamic_shared();
  if (tid_x() == 0) {
    mbarrier_init(shared, 2);
    mbarrier_arrive_expect_tx(shared, 16);
    mbarrier_arrive(shared);
    mbarrier_arrive(shared);
  }
}

static void never_arrives(void* const*) {
  const uint32_t shared = dynamic_shared();
  if (tid_x() == 0) {
    mbarrier_init(shared, 1);
  while (!mbarrier_try_wait_parity(shared, 0)) {} }
}

static void no_mbarrier(void* const*) {
  const uint32_t shared = dynamic_shared();
  mbarrier_arrive(shared);
}

static void second_init(void* const*) {
  const uint32_t shared = dynamic_shared();
  if (tid_x() == 0) {
    mbarrier_init(shared, 1);
    mbarrier_init(shared, 1);
  }
}

static void store_over_mbarrier(void* const*) {
  const uint32_t shared = dynamic_shared();
  const uint32_t v = 0;
  if (tid_x() == 0) {
    mbarrier_init(shared, 1);
    st_shared(shared, &v, 4);
  }
}

static void unordered_mbarrier(void* const*) {
  const uint32_t shared = dynamic_shared();
  if (tid_x() == 0) mbarrier_init(shared, 1);
  if (tid_x() == 32) while (true) mbarrier_arrive(shared);
}

static void mbarrier_orders(void* const* args) {
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

static void unequal_barriers(void* const*) {
  bar_sync(1, tid_x() < 32 ? 64 : 32);
}

static void too_few_registers(void* const*) {
  setmaxnreg_inc(232);
}

static void registers(void* const*) {
  if (tid_x() < 128) setmaxnreg_dec(40);
  else setmaxnreg_inc(232);
}

static void wrong_registers(void* const*) {
  setmaxnreg_dec(100);
}

static void no_tensor_map(void* const*) {
  static int map[32];
  prefetch_tensormap(map);
}

#define KERNEL(name) {#name, name}
extern "C" const Kernel hopper_kernels[] = {
    KERNEL(race), KERNEL(race_of_stores), KERNEL(same_value), KERNEL(overwrite), KERNEL(barrier), KERNEL(unwritten),
    KERNEL(misaligned), KERNEL(out_of_shared), KERNEL(out_of_global), KERNEL(divergent), KERNEL(exited_lane),
    KERNEL(partial_vote), KERNEL(foreign_mask), KERNEL(shuffles), KERNEL(elect), KERNEL(too_many_arrivals),
    KERNEL(never_arrives), KERNEL(no_mbarrier), KERNEL(second_init), KERNEL(store_over_mbarrier),
    KERNEL(unordered_mbarrier), KERNEL(mbarrier_orders), KERNEL(unequal_barriers), KERNEL(too_few_registers),
    KERNEL(registers), KERNEL(wrong_registers), KERNEL(no_tensor_map),
};
extern "C" const uint32_t hopper_kernel_count = sizeof hopper_kernels / sizeof *hopper_kernels;
