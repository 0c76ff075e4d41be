// The block kernel: a GEMM of inner products with the sigmoid loss as its epilogue.
//
// Persistent and warp-specialized: a CTA computes the tiles blockIdx.x, blockIdx.x + gridDim.x, … One producer thread
// loads their operands by TMA; two consumer warpgroups multiply them in turn, see config.h.
#pragma once

#include "config.h"
#include "epilogue.cuh"
#include "layout.h"
#include "params.h"
#include "pipeline.h"
#include "ptx.cuh"
#include "tile_scheduler.h"

namespace siglip::sm90 {

constexpr int kWarpgroupThreads = 128;
constexpr int kNumThreads = (1 + kNumConsumers) * kWarpgroupThreads;
// An SM has 65,536 registers, 168 a thread at launch; the consumers take over what the producer gives up.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kProducerRegisters + kNumConsumers * kConsumerRegisters <= 168 * (1 + kNumConsumers));

constexpr int kNumWgmmas = kBlockM / 64, kAccumulators = kBlockN / 2;  // kAccumulators: of a thread in each
static_assert(kNumWgmmas * kAccumulators == kNumSlices * kSlicePairs);

struct SharedStorage {
  alignas(1024) uint16_t x[kNumStages][kBlockM * kBlockK];
  alignas(1024) uint16_t y[kNumStages][kBlockN * kBlockK];
  alignas(1024) uint16_t dz[kNumConsumers][kBlockN / kStoreBoxColumns][kBlockM * kStoreBoxColumns];
  uint64_t full_barrier[kNumStages], empty_barrier[kNumStages], ordered_barrier[kNumConsumers];
};
constexpr int kSmemBytes = sizeof(SharedStorage) + 1024;  // the runtime aligns it less than the swizzle needs
static_assert(kSmemBytes <= 227 * 1024);

// Waits until the stage is free and announces its bytes to the full barrier, which it returns.
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
// Frees a stage for the producer. To be called by all threads of a warp.
__device__ __forceinline__ void consumer_release(uint64_t* empty_barrier) {
  if (threadIdx.x % 32 == 0) mbarrier_arrive(empty_barrier);
}

__device__ __forceinline__ void producer_loop(SharedStorage& shared, const BlockParams& params,
                                              const TensorMap& x_map, const TensorMap& y_map) {
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

// acc = the inner products of the consumer's own tile number `iteration`: of its images 0 to 63, and 64 to 127.
template <class Element>
__device__ __forceinline__ void mma_mainloop(SharedStorage& shared, int consumer, int iteration, int k_tiles,
                                             PipelineState& state, float (&acc)[kNumWgmmas][kAccumulators]) {
  constexpr int kWgmmaBytes = 64 * kBlockK * 2;
  uint64_t* previous_empty_barrier = nullptr;
  mbarrier_wait(&shared.ordered_barrier[consumer], ordered_barrier_phase(consumer, iteration));
  for (int k_tile = 0; k_tile < k_tiles; ++k_tile, state.advance()) {
    consumer_wait(shared, state);
    const uint64_t x_desc = make_smem_desc(smem_addr(shared.x[state.stage]));
    const uint64_t y_desc = make_smem_desc(smem_addr(shared.y[state.stage]));
    wgmma_fence();
    SIGLIP_UNROLL
    for (int k = 0; k < kBlockK; k += 16) {
      const uint64_t offset = desc_offset(k * 2);
      const bool accumulate = k_tile > 0 || k > 0;
      SIGLIP_UNROLL
      for (int w = 0; w < kNumWgmmas; ++w)
        wgmma_m64n128k16<Element>(acc[w], x_desc + offset + w * desc_offset(kWgmmaBytes), y_desc + offset, accumulate);
    }
    wgmma_commit_group();
    // One group stays in flight, so that the tensor cores never wait for a barrier.
    wgmma_wait_group<1>();
    if (previous_empty_barrier) consumer_release(previous_empty_barrier);
    previous_empty_barrier = &shared.empty_barrier[state.stage];
  }
  if (threadIdx.x % 32 == 0) mbarrier_arrive(&shared.ordered_barrier[next_consumer(consumer)]);
  wgmma_wait_group<0>();
  for (auto& half : acc) wgmma_fence_accumulator(half);
  consumer_release(previous_empty_barrier);
}

// The epilogue of a tile, whose first image and text are (row, column).
template <class Element, Pairs kPairs, Output kOutput>
__device__ __forceinline__ void run_epilogue(Epilogue<Element, kPairs, kOutput>& epilogue,
                                             float (&slices)[kNumSlices][kSlicePairs], int row, int column,
                                             uint16_t (&dz)[kBlockN / kStoreBoxColumns][kBlockM * kStoreBoxColumns]) {
  constexpr int kSlicesPerWgmma = kNumSlices / kNumWgmmas;
  const int warp = threadIdx.x % kWarpgroupThreads / 32;
  const auto slice_row = [&](int slice) { return slice / kSlicesPerWgmma * 64 + warp * 16; };
  const auto slice_column = [](int slice) { return slice % kSlicesPerWgmma * kSliceColumns; };
  const auto dz_smem = [&](int slice) {
    return smem_addr(dz[slice_column(slice) / kStoreBoxColumns]) + slice_row(slice) * kStoreBoxColumns * 2;
  };
  uint32_t others = ~0u;  // chunks that are not plain, kPlainChunks bits a slice
  if constexpr (Epilogue<Element, kPairs, kOutput>::kMayBePlain) {
    others = 0;
    epilogue.start_tile(row, column);
    SIGLIP_UNROLL
    for (int slice = 0; slice < kNumSlices; ++slice) {
      others |= epilogue.run_plain(slices[slice], row + slice_row(slice), column + slice_column(slice), dz_smem(slice))
                << slice * kPlainChunks;
      epilogue.flush();
    }
  }
  // The code of the others is long: it is there once, where no plain chunk has to jump over it, and the slices come to it.
  SIGLIP_NO_UNROLL
  for (int slice = 0; slice < kNumSlices && others; ++slice, others >>= kPlainChunks) {
    hide(row);
    hide(column);
    epilogue.run_others(slices[0], others, row + slice_row(slice), column + slice_column(slice), dz_smem(slice));
    SIGLIP_UNROLL
    for (int s = 1; s < kNumSlices; ++s)
      SIGLIP_UNROLL
      for (int i = 0; i < kSlicePairs; ++i) slices[s - 1][i] = slices[s][i];
    epilogue.flush();
  }
}

template <class Element, Pairs kPairs, Output kOutput>
__device__ __forceinline__ void consumer_loop(SharedStorage& shared, const BlockParams& params,
                                              const TensorMap& dz_map, int consumer) {
  const TileScheduler scheduler(params.rows, params.cols);
  const int k_tiles = num_k_tiles(params.features), warp = threadIdx.x % kWarpgroupThreads / 32;
  const bool stores = threadIdx.x % kWarpgroupThreads == 0;
  const int64_t partials_stride = int64_t(kPartialsPerTile) * scheduler.num_tiles();
  Epilogue<Element, kPairs, kOutput> epilogue(params);
  PipelineState state;
  state.advance(consumer * k_tiles);
  int index = blockIdx.x + consumer * gridDim.x;
  for (int iteration = 0; index < scheduler.num_tiles(); ++iteration, index += kNumConsumers * gridDim.x) {
    const TileCoord tile = scheduler.tile_coord(index);
    float acc[kNumWgmmas][kAccumulators];
    mma_mainloop<Element>(shared, consumer, iteration, k_tiles, state, acc);
    state.advance((kNumConsumers - 1) * k_tiles);

    if constexpr (kOutput == Output::kDz) {
      if (stores) tma_store_wait_group_read();
      named_barrier_sync(1 + consumer, kWarpgroupThreads);
    }
    run_epilogue(epilogue, reinterpret_cast<float(&)[kNumSlices][kSlicePairs]>(acc), tile.m, tile.n, shared.dz[consumer]);
    epilogue.write_partials(int64_t(index) * kPartialsPerTile + warp, partials_stride);
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

// The whole kernel.
template <class Element, Pairs kPairs, Output kOutput>
__device__ __forceinline__ void sigmoid_block(const BlockParams& params, const TensorMap& x_map, const TensorMap& y_map,
                                              const TensorMap& dz_map) {
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
    // From lane 0, so that the compiler knows it to be the same in the warp.
    const int warpgroup = __shfl_sync(~0u, int(threadIdx.x) / kWarpgroupThreads, 0);
    consumer_loop<Element, kPairs, kOutput>(shared, params, dz_map, warpgroup - 1);
  }
}

}  // namespace siglip::sm90
