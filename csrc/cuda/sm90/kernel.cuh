// The block kernel: a GEMM of inner products with the sigmoid loss as its epilogue.
//
// Persistent and warp-specialized: each SM computes the tiles blockIdx.x, blockIdx.x + gridDim.x, … One producer thread
// loads their operands by TMA; two consumer warpgroups take the tiles in turn (ping-pong), so that the epilogue of one
// overlaps with the MMAs of the other.
#pragma once

#include "epilogue.cuh"
#include "layout.h"
#include "params.h"
#include "pipeline.h"
#include "ptx.cuh"
#include "tile_scheduler.h"

namespace siglip::sm90 {

constexpr int kWarpgroupThreads = 128;
constexpr int kNumThreads = (1 + kNumConsumers) * kWarpgroupThreads;
constexpr int kWarpsPerWarpgroup = kWarpgroupThreads / 32;
// An SM has 65,536 registers, 168 a thread at launch; the consumers take over what the producer gives up.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kProducerRegisters + kNumConsumers * kConsumerRegisters <= 168 * (1 + kNumConsumers));

struct SharedStorage {
  alignas(1024) uint16_t x[kNumStages][kBlockM * kBlockK];
  alignas(1024) uint16_t y[kNumStages][kBlockN * kBlockK];
  alignas(1024) uint16_t dz[kNumConsumers][kBlockN / kStoreBoxColumns][kBlockM * kStoreBoxColumns];
  uint64_t full_barrier[kNumStages], empty_barrier[kNumStages], ordered_barrier[kNumConsumers];
};
constexpr int kSmemBytes = sizeof(SharedStorage) + 1024;  // the runtime aligns it less than the swizzle needs

// Waits until the stage is free, and announces its bytes to the full barrier, which it returns.
__device__ __forceinline__ uint64_t* producer_acquire(SharedStorage& shared, const PipelineState& state) {
  mbarrier_wait(&shared.empty_barrier[state.stage], state.producer_phase());
  uint64_t* const full_barrier = &shared.full_barrier[state.stage];
  mbarrier_arrive_expect_tx(full_barrier, sizeof shared.x[0] + sizeof shared.y[0]);
  return full_barrier;
}
// Waits until the operands of the stage have arrived.
__device__ __forceinline__ void consumer_wait(SharedStorage& shared, const PipelineState& state) {
  mbarrier_wait(&shared.full_barrier[state.stage], state.phase);
}
// Frees a stage; to be called by one thread of each warp, as the barrier counts.
__device__ __forceinline__ void consumer_release(uint64_t* empty_barrier) { mbarrier_arrive(empty_barrier); }

__device__ __forceinline__ void producer_loop(SharedStorage& shared, const BlockParams& params,
                                              const CUtensorMap& x_map, const CUtensorMap& y_map) {
  const TileScheduler scheduler(params.rows, params.cols);
  const int k_tiles = num_k_tiles(params.features);
  PipelineState state;
  prefetch_tensormap(&x_map);
  prefetch_tensormap(&y_map);
  for (int index = blockIdx.x; index < scheduler.num_tiles(); index += gridDim.x) {
    const TileCoord tile = scheduler.tile_coord(index);
    for (int k_tile = 0; k_tile < k_tiles; ++k_tile, state.advance()) {
      uint64_t* const full_barrier = producer_acquire(shared, state);
      tma_load_2d(shared.x[state.stage], &x_map, k_tile * kBlockK, tile.m, full_barrier);
      tma_load_2d(shared.y[state.stage], &y_map, k_tile * kBlockK, tile.n, full_barrier);
    }
  }
}

// acc = the inner products of the consumer's own tile number `iteration`: images 0 to 63 of the tile, and 64 to 127.
template <class Element>
__device__ __forceinline__ void mma_mainloop(SharedStorage& shared, int consumer, int iteration, int k_tiles,
                                             PipelineState& state, float (&acc)[2][64]) {
  const bool arrives = threadIdx.x % 32 == 0;
  uint64_t* previous_empty_barrier = nullptr;
  mbarrier_wait(&shared.ordered_barrier[consumer], ordered_barrier_phase(consumer, iteration));
  for (int k_tile = 0; k_tile < k_tiles; ++k_tile, state.advance()) {
    consumer_wait(shared, state);
    const uint64_t x_desc = make_smem_desc(shared.x[state.stage]), y_desc = make_smem_desc(shared.y[state.stage]);
    wgmma_fence();
    SIGLIP_UNROLL
    for (int k = 0; k < kBlockK; k += 16) {
      const uint64_t offset = desc_offset(k * 2);
      const bool accumulate = k_tile > 0 || k > 0;
      wgmma_m64n128k16<Element>(acc[0], x_desc + offset, y_desc + offset, accumulate);
      wgmma_m64n128k16<Element>(acc[1], x_desc + offset + desc_offset(64 * kBlockK * 2), y_desc + offset, accumulate);
    }
    wgmma_commit_group();
    // One group stays in flight, so that the tensor cores never wait for a barrier.
    wgmma_wait_group<1>();
    if (previous_empty_barrier && arrives) consumer_release(previous_empty_barrier);
    previous_empty_barrier = &shared.empty_barrier[state.stage];
  }
  if (arrives) mbarrier_arrive(&shared.ordered_barrier[next_consumer(consumer)]);
  wgmma_wait_group<0>();
  wgmma_fence_accumulator(acc[0]);
  wgmma_fence_accumulator(acc[1]);
  if (arrives) consumer_release(previous_empty_barrier);
}

template <class Element, bool kGeneral, Output kOutput>
__device__ __forceinline__ void consumer_loop(SharedStorage& shared, const BlockParams& params,
                                              const CUtensorMap& dz_map, int consumer) {
  const TileScheduler scheduler(params.rows, params.cols);
  const int k_tiles = num_k_tiles(params.features), warp = threadIdx.x % kWarpgroupThreads / 32;
  const bool stores = threadIdx.x % kWarpgroupThreads == 0;
  const int64_t partials_stride = int64_t(kPartialsPerTile) * scheduler.num_tiles();
  Epilogue<Element, kGeneral, kOutput> epilogue(params);
  PipelineState state;
  state.advance(consumer * k_tiles);
  int index = blockIdx.x + consumer * gridDim.x;
  for (int iteration = 0; index < scheduler.num_tiles(); ++iteration, index += kNumConsumers * gridDim.x) {
    const TileCoord tile = scheduler.tile_coord(index);
    float acc[2][64];
    mma_mainloop<Element>(shared, consumer, iteration, k_tiles, state, acc);
    state.advance((kNumConsumers - 1) * k_tiles);

    if constexpr (kOutput == Output::kDz) {
      if (stores) tma_store_wait_group_read();
      named_barrier_sync(1 + consumer, kWarpgroupThreads);
    }
    SIGLIP_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = half * 64 + warp * 16;
      epilogue.run(acc[half], tile.m + row, tile.n, smem_addr(shared.dz[consumer]) + row * kStoreBoxColumns * 2);
    }
    epilogue.write_partials(params.partials + int64_t(index) * kPartialsPerTile + warp, partials_stride);
    if constexpr (kOutput == Output::kDz) {
      fence_proxy_async();
      named_barrier_sync(1 + consumer, kWarpgroupThreads);
      if (stores) {
        for (int box = 0; box < kBlockN / kStoreBoxColumns; ++box)
          tma_store_2d(&dz_map, tile.n + box * kStoreBoxColumns, tile.m, shared.dz[consumer][box]);
        tma_store_commit_group();
      }
    }
  }
  if (kOutput == Output::kDz && stores) tma_store_wait_group();
}

template <class Element, bool kGeneral, Output kOutput>
__global__ void __launch_bounds__(kNumThreads, 1)
    sigmoid_block_kernel(const __grid_constant__ BlockParams params, const __grid_constant__ CUtensorMap x_map,
                         const __grid_constant__ CUtensorMap y_map, const __grid_constant__ CUtensorMap dz_map) {
  extern __shared__ uint8_t smem[];
  SharedStorage& shared =
      *reinterpret_cast<SharedStorage*>((reinterpret_cast<uintptr_t>(smem) + 1023) & ~uintptr_t(1023));
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kNumStages; ++stage) {
      mbarrier_init(&shared.full_barrier[stage], 1);
      mbarrier_init(&shared.empty_barrier[stage], kWarpsPerWarpgroup);
    }
    for (uint64_t& barrier : shared.ordered_barrier) mbarrier_init(&barrier, kWarpsPerWarpgroup);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroupThreads) {
    setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x == 0) producer_loop(shared, params, x_map, y_map);
  } else {
    setmaxnreg_inc<kConsumerRegisters>();
    consumer_loop<Element, kGeneral, kOutput>(shared, params, dz_map, threadIdx.x / kWarpgroupThreads - 1);
  }
}

}  // namespace siglip::sm90
