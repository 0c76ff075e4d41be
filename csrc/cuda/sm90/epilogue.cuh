// The epilogue of a tile: the sigmoid loss of the accumulator in registers. Writes dz to shared memory, sums to global.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "layout.h"
#include "params.h"
#include "ptx.cuh"
#include "sigmoid_loss.h"
#include "tile_scheduler.h"

namespace siglip::sm90 {

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

enum class Output { kDz, kSums, kLoss };  // dz and the sums; the sums; the loss alone

// One warp's rows of a tile, in chunks of 32 columns. kGeneral: ids and weights, where they are given.
template <class Element, bool kGeneral, Output kOutput>
class Epilogue {
 public:
  static constexpr int kChunkColumns = 32, kChunkPairs = kChunkColumns / 2;  // kChunkPairs: of one thread
  static constexpr bool kLossOnly = kOutput == Output::kLoss;

  __device__ explicit Epilogue(const BlockParams& params)
      : params_(params),
        scale_(*params.scale),
        bias_(*params.bias),
        dz_scale_(params.dz_scale ? *params.dz_scale : 1.0f),
        lane_(threadIdx.x % 32) {}

  // acc: the warp's inner products, 16 rows from `row` on and kBlockN columns from `column` on. dz_smem: shared memory
  // address of these rows in the first of the boxes that TMA stores.
  __device__ void run(const float (&acc)[kBlockN / 2], int row, int column, uint32_t dz_smem) {
    // Unrolled, because registers cannot be indexed at run time.
    SIGLIP_UNROLL
    for (int c = 0; c < kBlockN / kChunkColumns; ++c)
      run_chunk(reinterpret_cast<const float(&)[kChunkPairs]>(acc[c * kChunkPairs]), row, column + c * kChunkColumns,
                dz_smem + c * kChunkColumns / kStoreBoxColumns * (kConsumerRows * kStoreBoxColumns * 2),
                c * kChunkColumns % kStoreBoxColumns);
    sums_.flush();
  }

  // Reduces the sums of everything run so far over the warp, writes them, and starts again from 0.
  __device__ void write_partials(float* partials, int64_t stride) {
    const float sums[3] = {sums_.loss, sums_.dz_u, sums_.dz};
    for (int s = 0; s < (kLossOnly ? 1 : 3); ++s) {
      float sum = sums[s];
      for (int lane_mask = 16; lane_mask; lane_mask /= 2) sum += __shfl_xor_sync(~0u, sum, lane_mask);
      if (lane_ == 0) partials[s * stride] = sum;
    }
    sums_ = Sums();
  }

 private:
  __device__ int row_of(int i) const { return accumulator_row(lane_, i); }
  __device__ int column_of(int i) const { return accumulator_column(lane_, i); }

  __device__ void run_chunk(const float (&u)[kChunkPairs], int row, int column, uint32_t dz_smem, int box_column) {
    float a[kChunkPairs], dz[kChunkPairs];
    SIGLIP_UNROLL
    for (int i = 0; i < kChunkPairs; ++i) a[i] = fmaf(u[i], scale_, bias_);

    const uint32_t positive = positive_mask(row, column);
    const bool any_positive = __any_sync(~0u, positive != 0);
    if (any_positive) negate_positives(a, positive);
    if (row + 16 > params_.rows || column + kChunkColumns > params_.cols) {
      // Out of bounds a is -inf, where softplus and sigmoid are 0.
      SIGLIP_UNROLL
      for (int i = 0; i < kChunkPairs; ++i)
        if (row + row_of(i) >= params_.rows || column + column_of(i) >= params_.cols) a[i] = -INFINITY;
    }

    if (kGeneral && params_.image_weights) {
      float weight[kChunkPairs];
      SIGLIP_UNROLL
      for (int i = 0; i < kChunkPairs; ++i) weight[i] = pair_weight(row + row_of(i), column + column_of(i));
      accumulate_weighted_pairs<kLossOnly>(a, weight, dz, sums_);
    } else if (__all_sync(~0u, all_below_threshold(a))) {
      accumulate_pairs<true, kLossOnly>(a, dz, sums_);
    } else {
      accumulate_pairs<false, kLossOnly>(a, dz, sums_);
    }
    if constexpr (kLossOnly) return;

    if (any_positive) negate_positives(dz, positive);
    SIGLIP_UNROLL
    for (int i = 0; i < kChunkPairs; ++i) {
      sums_.dz_u = fmaf(dz[i], u[i], sums_.dz_u);
      sums_.dz += dz[i];
    }
    if constexpr (kOutput == Output::kDz) store_dz(dz, dz_smem, box_column);
  }

  // Which of the chunk's pairs are positive: bit i for this lane's i-th.
  __device__ uint32_t positive_mask(int row, int column) const {
    uint32_t mask = 0;
    const int diagonal = row + params_.offset - column;
    if (kGeneral && params_.image_ids) {
      SIGLIP_UNROLL
      for (int i = 0; i < kChunkPairs; ++i) mask |= uint32_t(ids_match(row + row_of(i), column + column_of(i))) << i;
    } else if (-16 < diagonal && diagonal < kChunkColumns) {
      SIGLIP_UNROLL
      for (int i = 0; i < kChunkPairs; ++i) mask |= uint32_t(diagonal + row_of(i) == column_of(i)) << i;
    }
    return mask;
  }

  __device__ static void negate_positives(float (&values)[kChunkPairs], uint32_t positive) {
    SIGLIP_UNROLL
    for (int i = 0; i < kChunkPairs; ++i) values[i] = positive >> i & 1 ? -values[i] : values[i];
  }

  __device__ void store_dz(const float (&dz)[kChunkPairs], uint32_t dz_smem, int box_column) const {
    SIGLIP_UNROLL
    for (int i = 0; i < kChunkPairs; i += 8) {
      uint32_t packed[4];
      SIGLIP_UNROLL
      for (int p = 0; p < 4; ++p)
        packed[p] = Element::pack(dz[i + 2 * p] * dz_scale_, dz[i + 2 * p + 1] * dz_scale_);
      stmatrix_x4(dz_smem + swizzled_offset(lane_, box_column / 8 + i / 4), packed[0], packed[1], packed[2], packed[3]);
    }
  }

  __device__ bool ids_match(int row, int column) const {
    return row < params_.rows && column < params_.cols && params_.image_ids[row] == params_.text_ids[column];
  }
  __device__ float pair_weight(int row, int column) const {
    const bool in_bounds = row < params_.rows && column < params_.cols;
    return in_bounds ? params_.image_weights[row] * params_.text_weights[column] : 0.0f;
  }

  const BlockParams& params_;
  const float scale_, bias_, dz_scale_;
  const int lane_;
  Sums sums_;
};

}  // namespace siglip::sm90
