// The block kernel: inner products by the tensor cores, then the sigmoid loss on them in registers.
//
// Persistent: each multiprocessor works on tiles blockIdx.x, blockIdx.x + gridDim.x, … A producer warp brings their
// operands; two consumer warpgroups take the tiles in turn, so that one's epilogue runs under the other's products.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "block.h"
#include "epilogue.h"
#include "fragment.h"
#include "pipeline.h"
#include "ptx.cuh"
#include "tiles.h"

namespace siglip::sm90 {

constexpr int kWarpgroup = 128;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kWarps = kWarpgroup / 32;
// Of 65,536 registers, 168 a thread at launch.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= 168 * (1 + kConsumers));

struct Bfloat16 {
  static constexpr bool kIsBfloat16 = true;
  __device__ static uint32_t pack(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(both);
  }
};
struct Float16 {
  static constexpr bool kIsBfloat16 = false;
  __device__ static uint32_t pack(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(both);
  }
};

enum class Output { kDz, kSums, kLoss };  // dz and sums; no dz; the first sum alone

struct Shared {
  alignas(1024) uint16_t x[kStages][kBlockM * kBlockK];
  alignas(1024) uint16_t y[kStages][kBlockN * kBlockK];
  alignas(1024) uint16_t dz[kConsumers][kBlockN / kStoredColumns][kBlockM * kStoredColumns];
  uint64_t full[kStages], empty[kStages], turn[kConsumers];
};
constexpr int kSharedBytes = sizeof(Shared) + 1024;  // room to align it

// One warp's part of a tile's epilogue, in chunks of 32 columns.
template <class Operand, bool kGeneral, Output kOutput>
class Epilogue {
 public:
  static constexpr int kColumns = 32, kPairs = kColumns / 2;  // of a chunk; of one thread: two rows
  static constexpr bool kLossOnly = kOutput == Output::kLoss;

  __device__ explicit Epilogue(const Block& block)
      : block_(block),
        scale_(*block.scale),
        bias_(*block.bias),
        dz_scale_(block.dz_scale ? *block.dz_scale : 1.0f),
        lane_(threadIdx.x % 32) {}

  // Inner products of 16 rows from `row` on, 128 columns from `column` on: the warp's part of acc. dz: where the copy
  // engine takes the tile's first column of these rows from, as swizzled boxes.
  __device__ void run(const float (&acc)[64], int row, int column, uint32_t dz) {
    // Unrolled: registers have no addresses.
    SIGLIP_UNROLL
    for (int c = 0; c < kBlockN / kColumns; ++c)
      chunk(reinterpret_cast<const float(&)[kPairs]>(acc[c * kPairs]), row, column + c * kColumns,
            dz + c * kColumns / kStoredColumns * (kBlockM * kStoredColumns * 2), c * kColumns % kStoredColumns);
    sums_.flush();
  }

  // Of all that has been run, one of the warp.
  __device__ void write(float* partials, int64_t stride) {
    const float sums[3] = {sums_.loss, sums_.dz_u, sums_.dz};
    for (int s = 0; s < (kLossOnly ? 1 : 3); ++s) {
      float sum = sums[s];
      for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
      if (lane_ == 0) partials[s * stride] = sum;
    }
    sums_ = Sums();
  }

 private:
  __device__ int row_of(int i) const { return fragment_row(lane_, i); }
  __device__ int column_of(int i) const { return fragment_column(lane_, i); }

  __device__ void chunk(const float (&u)[kPairs], int row, int column, uint32_t dz, int dz_column) {
    float a[kPairs], g[kPairs];
    SIGLIP_UNROLL
    for (int i = 0; i < kPairs; ++i) a[i] = fmaf(u[i], scale_, bias_);

    // Which pairs are positive, one bit each.
    uint32_t positive = 0;
    const int first = row + block_.offset - column;
    if (kGeneral && block_.image_ids) {
      SIGLIP_UNROLL
      for (int i = 0; i < kPairs; ++i) positive |= uint32_t(ids_agree(row + row_of(i), column + column_of(i))) << i;
    } else if (-16 < first && first < kColumns) {
      SIGLIP_UNROLL
      for (int i = 0; i < kPairs; ++i) positive |= uint32_t(first + row_of(i) == column_of(i)) << i;
    }
    const bool any_positive = __any_sync(~0u, positive != 0);
    if (any_positive) {
      SIGLIP_UNROLL
      for (int i = 0; i < kPairs; ++i) a[i] = positive >> i & 1 ? -a[i] : a[i];
    }
    if (row + 16 > block_.rows || column + kColumns > block_.cols) {
      // Out of range: softplus and sigmoid of -inf are 0.
      SIGLIP_UNROLL
      for (int i = 0; i < kPairs; ++i)
        if (row + row_of(i) >= block_.rows || column + column_of(i) >= block_.cols) a[i] = -INFINITY;
    }

    if (kGeneral && block_.image_weights) {
      float weight[kPairs];
      SIGLIP_UNROLL
      for (int i = 0; i < kPairs; ++i) weight[i] = weight_of(row + row_of(i), column + column_of(i));
      weighted_pairs<kLossOnly>(a, weight, g, sums_);
    } else if (__all_sync(~0u, all_low(a))) {
      pairs<true, kLossOnly>(a, g, sums_);
    } else {
      pairs<false, kLossOnly>(a, g, sums_);
    }
    if constexpr (kLossOnly) return;

    if (any_positive) {
      SIGLIP_UNROLL
      for (int i = 0; i < kPairs; ++i) g[i] = positive >> i & 1 ? -g[i] : g[i];
    }
    SIGLIP_UNROLL
    for (int i = 0; i < kPairs; ++i) {
      sums_.dz_u = fmaf(g[i], u[i], sums_.dz_u);
      sums_.dz += g[i];
    }
    if constexpr (kOutput == Output::kDz) {
      SIGLIP_UNROLL
      for (int i = 0; i < kPairs; i += 8) {
        uint32_t packed[4];
        SIGLIP_UNROLL
        for (int p = 0; p < 4; ++p)
          packed[p] = Operand::pack(g[i + 2 * p] * dz_scale_, g[i + 2 * p + 1] * dz_scale_);
        store_matrices(dz + stored_at(lane_, dz_column / 8 + i / 4), packed[0], packed[1], packed[2], packed[3]);
      }
    }
  }

  __device__ bool ids_agree(int row, int column) const {
    return row < block_.rows && column < block_.cols && block_.image_ids[row] == block_.text_ids[column];
  }
  __device__ float weight_of(int row, int column) const {
    const bool inside = row < block_.rows && column < block_.cols;
    return inside ? block_.image_weights[row] * block_.text_weights[column] : 0.0f;
  }

  const Block& block_;
  const float scale_, bias_, dz_scale_;
  const int lane_;
  Sums sums_;
};

__device__ __forceinline__ void produce(Shared& shared, const Block& block, const CUtensorMap& x,
                                        const CUtensorMap& y) {
  const Tiles tiles(block.rows, block.cols);
  const int steps = stages_of(block.features);
  Turn turn;
  prefetch(&x);
  prefetch(&y);
  for (int index = blockIdx.x; index < tiles.count(); index += gridDim.x) {
    const Tile tile = tiles.at(index);
    for (int step = 0; step < steps; ++step, turn.advance()) {
      barrier_wait(&shared.empty[turn.stage], turn.before());
      uint64_t* const full = &shared.full[turn.stage];
      barrier_arrive_expecting(full, sizeof shared.x[0] + sizeof shared.y[0]);
      load_box(shared.x[turn.stage], &x, step * kBlockK, tile.m, full);
      load_box(shared.y[turn.stage], &y, step * kBlockK, tile.n, full);
    }
  }
}

// acc = the inner products of the consumer's tile number `own`: images 0 to 63 of it, and 64 to 127.
template <class Operand>
__device__ __forceinline__ void inner_products(Shared& shared, int consumer, int own, int steps, Turn& turn,
                                               float (&acc)[2][64]) {
  const bool arrives = threadIdx.x % 32 == 0;
  uint64_t* last = nullptr;
  barrier_wait(&shared.turn[consumer], turn_parity(consumer, own));
  for (int step = 0; step < steps; ++step, turn.advance()) {
    barrier_wait(&shared.full[turn.stage], turn.parity);
    const uint64_t x = operand_descriptor(shared.x[turn.stage]), y = operand_descriptor(shared.y[turn.stage]);
    products_begin();
    SIGLIP_UNROLL
    for (int k = 0; k < kBlockK; k += 16) {
      const uint64_t at = descriptor_bytes(k * 2);
      multiply<Operand>(acc[0], x + at, y + at, step > 0 || k > 0);
      multiply<Operand>(acc[1], x + at + descriptor_bytes(64 * kBlockK * 2), y + at, step > 0 || k > 0);
    }
    products_commit();
    // One group stays under way, so that the tensor cores never wait for a barrier.
    products_wait<1>();
    if (last && arrives) barrier_arrive(last);
    last = &shared.empty[turn.stage];
  }
  if (arrives) barrier_arrive(&shared.turn[next_consumer(consumer)]);
  products_wait<0>();
  products_end(acc[0]);
  products_end(acc[1]);
  if (arrives) barrier_arrive(last);
}

template <class Operand, bool kGeneral, Output kOutput>
__device__ __forceinline__ void consume(Shared& shared, const Block& block, const CUtensorMap& dz_map, int consumer) {
  const Tiles tiles(block.rows, block.cols);
  const int steps = stages_of(block.features), warp = threadIdx.x % kWarpgroup / 32;
  const bool stores = threadIdx.x % kWarpgroup == 0;
  const int64_t partials_stride = int64_t(kPartials) * tiles.count();
  Epilogue<Operand, kGeneral, kOutput> epilogue(block);
  Turn turn;
  turn.advance(consumer * steps);
  int index = blockIdx.x + consumer * gridDim.x;
  for (int own = 0; index < tiles.count(); ++own, index += kConsumers * gridDim.x) {
    const Tile tile = tiles.at(index);
    float acc[2][64];
    inner_products<Operand>(shared, consumer, own, steps, turn, acc);
    turn.advance((kConsumers - 1) * steps);

    if constexpr (kOutput == Output::kDz) {
      if (stores) store_wait_read();
      named_barrier(1 + consumer, kWarpgroup);
    }
    SIGLIP_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = half * 64 + warp * 16;
      epilogue.run(acc[half], tile.m + row, tile.n, shared_address(shared.dz[consumer]) + row * kStoredColumns * 2);
    }
    epilogue.write(block.partials + int64_t(index) * kPartials + warp, partials_stride);
    if constexpr (kOutput == Output::kDz) {
      store_fence();
      named_barrier(1 + consumer, kWarpgroup);
      if (stores) {
        for (int box = 0; box < kBlockN / kStoredColumns; ++box)
          store_box(&dz_map, tile.n + box * kStoredColumns, tile.m, shared.dz[consumer][box]);
        store_commit();
      }
    }
  }
  if (kOutput == Output::kDz && stores) store_wait();
}

template <class Operand, bool kGeneral, Output kOutput>
__global__ void __launch_bounds__(kThreads, 1)
    sigmoid_block_kernel(const __grid_constant__ Block block, const __grid_constant__ CUtensorMap x,
                         const __grid_constant__ CUtensorMap y, const __grid_constant__ CUtensorMap dz) {
  extern __shared__ uint8_t memory[];
  Shared& shared = *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(memory) + 1023) & ~uintptr_t(1023));
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(&shared.full[stage], 1);
      barrier_init(&shared.empty[stage], kWarps);
    }
    for (uint64_t& turn : shared.turn) barrier_init(&turn, kWarps);
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    fewer_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce(shared, block, x, y);
  } else {
    more_registers<kConsumerRegisters>();
    consume<Operand, kGeneral, kOutput>(shared, block, dz, threadIdx.x / kWarpgroup - 1);
  }
}

}  // namespace siglip::sm90
