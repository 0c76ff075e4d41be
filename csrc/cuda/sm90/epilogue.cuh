// The epilogue of a tile: the sigmoid loss of the accumulator in registers. Writes dz to shared memory, sums to global.
#pragma once

#include "general_pairs.cuh"
#include "layout.h"
#include "params.h"
#include "ptx.cuh"
#include "sigmoid_loss.h"
#include "tile_scheduler.h"

namespace siglip::sm90 {

struct Bfloat16 {
  static constexpr bool kIsBfloat16 = true;
  __device__ static uint32_t pack(float low, float high) { return cvt_bf16x2(low, high); }
};
struct Float16 {
  static constexpr bool kIsBfloat16 = false;
  __device__ static uint32_t pack(float low, float high) { return cvt_f16x2(low, high); }
};

// dz and the sums; the same with dz in float32; the sums; the loss alone.
enum class Output { kDz, kFloat32Dz, kSums, kLoss };
// kOffset: by the offset alone. kGeneral: ids, weights and masses, where they are given. kStats: and the logits' stats.
enum class Pairs { kOffset, kGeneral, kStats };

// Columns of the accumulator elements that the epilogue takes at once, on 16 rows of a warp: a box of TMA's.
constexpr int kSliceColumns = kStoreBoxColumns, kSlicePairs = kSliceColumns / 2;
// Columns of a plain chunk, and a thread's pairs of it: negatives of weight 1 with low logits, most of most trainings.
constexpr int kPlainColumns = 32, kPlainPairs = kPlainColumns / 2, kPlainChunks = kSliceColumns / kPlainColumns;
// Out of bounds, and for pairs that are left out: softplus and sigmoid are 0 there.
constexpr float kNothing = -1e4f;

// One warp's rows of a tile, in chunks of columns.
template <class Element, Pairs kPairs, Output kOutput>
class Epilogue {
 public:
  static constexpr bool kLossOnly = kOutput == Output::kLoss;
  static constexpr bool kMayBePlain = kPairs != Pairs::kStats;
  static constexpr int kChunkColumns = kPairs == Pairs::kOffset ? kPlainColumns : kGeneralChunkColumns;
  static constexpr int kChunkPairs = kChunkColumns / 2;  // of one thread

  __device__ explicit Epilogue(const BlockParams& params)
      : params_(params),
        scale_(*params.scale),
        bias_(*params.bias),
        dz_scale_(params.dz_scale ? *params.dz_scale : 1.0f),
        lane_(threadIdx.x % 32),
        pairs_(params, lane_) {}

  // Before the chunks of a tile, whose first image and text are (row, column).
  __device__ void start_tile(int row, int column) {
    const int diagonal = row + params_.offset - column;
    is_plain_ = row + kBlockM <= params_.rows && column + kBlockN <= params_.cols;
    if (pairs_.by_offset()) is_plain_ &= diagonal <= -kBlockM || diagonal >= kBlockN;
    if (kPairs == Pairs::kGeneral && params_.image_weights) is_plain_ = false;
  }

  // acc: the warp's inner products, 16 rows from `row` on and kSliceColumns from `column` on. dz_smem: shared memory
  // address of these rows in the box that TMA stores. Does the plain chunks; bit c of the result if the c-th is not one.
  __device__ uint32_t run_plain(const float (&acc)[kSlicePairs], int row, int column, uint32_t dz_smem) {
    uint32_t others = 0;
    if (kPairs == Pairs::kGeneral && is_plain_) pairs_.load_rows(row);
    // Unrolled, because registers cannot be indexed at run time.
    SIGLIP_UNROLL
    for (int c = 0; c < kPlainChunks; ++c) {
      const auto& u = reinterpret_cast<const float(&)[kPlainPairs]>(acc[c * kPlainPairs]);
      float a[kPlainPairs], dz[kPlainPairs];
      bool may_match = false;
      if (kPairs == Pairs::kGeneral && is_plain_) may_match = pairs_.may_match<kPlainPairs>(column + c * kPlainColumns);
      compute_logits(u, a);
      if (is_plain_ && __all_sync(~0u, !may_match && all_low(a))) {
        accumulate_pairs<true, kLossOnly>(a, dz, sums_);
        store_and_add(u, dz, row, column + c * kPlainColumns, dz_smem);
      } else {
        others |= 1u << c;
      }
    }
    return others;
  }

  // The chunks that `others` has, whatever they are.
  __device__ void run_others(const float (&acc)[kSlicePairs], uint32_t others, int row, int column, uint32_t dz_smem) {
    if constexpr (kPairs != Pairs::kOffset) pairs_.load_rows(row);
    SIGLIP_UNROLL
    for (int c = 0; c < kSliceColumns / kChunkColumns; ++c) {
      if (others >> c * kChunkColumns / kPlainColumns & 1)
        run_chunk(reinterpret_cast<const float(&)[kChunkPairs]>(acc[c * kChunkPairs]), row, column + c * kChunkColumns,
                  dz_smem);
    }
  }

  // To be called once for at most kMaxFactors pairs of a thread.
  __device__ void flush() { sums_.flush(); }

  // Reduces the sums of everything run so far over the warp, writes them at `partial`, and starts again from 0.
  __device__ void write_partials(int64_t partial, int64_t stride) {
    const float sums[3] = {sums_.loss, sums_.dz_u, sums_.dz};
    for (int s = 0; s < (kLossOnly ? 1 : 3); ++s) reduce(sums[s], params_.partials + s * stride + partial, Add());
    sums_ = Sums();
    if constexpr (kPairs == Pairs::kStats) {
      for (int k = 0; k < 2; ++k) {
        float* const stats = params_.stats + k * stride + partial;
        reduce(stats_.sum[k], stats, Add());
        reduce(float(stats_.count[k]), stats + 2 * stride, Add());
        reduce(stats_.least[k], stats + 4 * stride, Least());
        reduce(stats_.largest[k], stats + 6 * stride, Largest());
      }
      stats_ = LogitStats();
    }
  }

 private:
  struct Add {
    __device__ float operator()(float a, float b) const { return a + b; }
  };
  struct Least {
    __device__ float operator()(float a, float b) const { return fminf(a, b); }
  };
  struct Largest {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
  };

  template <class Operation>
  __device__ void reduce(float value, float* at, Operation operation) const {
    for (int lane_mask = 16; lane_mask; lane_mask /= 2)
      value = operation(value, __shfl_xor_sync(~0u, value, lane_mask));
    if (lane_ == 0) *at = value;
  }

  __device__ int row_of(int i) const { return accumulator_row(lane_, i); }
  __device__ int column_of(int i) const { return accumulator_column(lane_, i); }

  template <int kCount>
  __device__ void compute_logits(const float (&u)[kCount], float (&a)[kCount]) const {
    SIGLIP_UNROLL
    for (int i = 0; i < kCount; ++i) a[i] = fmaf(u[i], scale_, bias_);
  }

  __device__ void run_chunk(const float (&u)[kChunkPairs], int row, int column, uint32_t dz_smem) {
    if constexpr (kPairs != Pairs::kOffset) hide(column);
    float a[kChunkPairs], dz[kChunkPairs];
    const uint32_t positive = find_positives(row, column);
    // The branch also keeps the chunks apart: else registers would hold the ids and weights of several.
    if (kPairs == Pairs::kOffset || __any_sync(~0u, pairs_.counted != 0)) {
      compute_logits(u, a);
      run_pairs(a, row, column, positive, dz);
    } else {
      SIGLIP_UNROLL
      for (float& value : dz) value = 0;
    }
    store_and_add(u, dz, row, column, dz_smem);
  }

  // Adds the loss of a chunk with the logits a to the sums, and computes its dz.
  __device__ void run_pairs(float (&a)[kChunkPairs], int row, int column, uint32_t positive, float (&dz)[kChunkPairs]) {
    const bool any_positive = __any_sync(~0u, positive != 0);
    if constexpr (kPairs == Pairs::kStats) {
      const uint32_t weighted = pairs_.weighted();
      stats_.add(a, weighted & positive, weighted & ~positive);
    }
    if (any_positive) negate_positives(a, positive);
    if constexpr (kPairs == Pairs::kOffset)
      leave_out_of_bounds(a, row, column);
    else
      leave_uncounted(a);

    if (kPairs != Pairs::kOffset && params_.image_weights)
      accumulate_weighted_pairs(a, dz);
    else
      accumulate_pairs<false, kLossOnly>(a, dz, sums_);
    if (!kLossOnly && any_positive) negate_positives(dz, positive);
  }

  // Adds dz to the sums, and stores it.
  template <int kCount>
  __device__ void store_and_add(const float (&u)[kCount], const float (&dz)[kCount], int row, int column,
                                uint32_t dz_smem) {
    if constexpr (!kLossOnly) {
      SIGLIP_UNROLL
      for (int i = 0; i < kCount; ++i) {
        sums_.dz_u = fmaf(dz[i], u[i], sums_.dz_u);
        sums_.dz += dz[i];
      }
    }
    if constexpr (kOutput == Output::kDz) store_dz(dz, dz_smem, column);
    if constexpr (kOutput == Output::kFloat32Dz) store_float32_dz(dz, row, column);
  }

  // Which of the chunk's pairs are positive: bit i for this lane's i-th.
  __device__ uint32_t find_positives(int row, int column) {
    if constexpr (kPairs != Pairs::kOffset) {
      pairs_.load_columns(column);
      return pairs_.positive;
    }
    uint32_t mask = 0;
    const int diagonal = row + params_.offset - column;
    if (-16 < diagonal && diagonal < kChunkColumns) {
      SIGLIP_UNROLL
      for (int i = 0; i < kChunkPairs; ++i) mask |= uint32_t(diagonal + row_of(i) == column_of(i)) << i;
    }
    return mask;
  }

  __device__ static void negate_positives(float (&values)[kChunkPairs], uint32_t positive) {
    SIGLIP_UNROLL
    for (int i = 0; i < kChunkPairs; ++i) values[i] = positive >> i & 1 ? -values[i] : values[i];
  }

  __device__ void leave_out_of_bounds(float (&a)[kChunkPairs], int row, int column) const {
    if (row + 16 <= params_.rows && column + kChunkColumns <= params_.cols) return;
    SIGLIP_UNROLL
    for (int i = 0; i < kChunkPairs; ++i)
      if (row + row_of(i) >= params_.rows || column + column_of(i) >= params_.cols) a[i] = kNothing;
  }
  __device__ void leave_uncounted(float (&a)[kChunkPairs]) const {
    SIGLIP_UNROLL
    for (int i = 0; i < kChunkPairs; ++i) a[i] = pairs_.counted >> i & 1 ? a[i] : kNothing;
  }

  __device__ void accumulate_weighted_pairs(const float (&a)[kChunkPairs], float (&sigmoid)[kChunkPairs]) {
    SIGLIP_UNROLL
    for (int i = 0; i < kChunkPairs; ++i) {
      const auto [mass, opposite] = pairs_.parts(i);
      sigmoid[i] = accumulate_weighted_pair<kLossOnly>(a[i], pairs_.weight(i), mass, opposite, sums_);
    }
  }

  template <int kCount>
  __device__ void store_dz(const float (&dz)[kCount], uint32_t dz_smem, int column) const {
    const int box_column = column % kStoreBoxColumns;
    SIGLIP_UNROLL
    for (int i = 0; i < kCount; i += 8) {
      uint32_t packed[4];
      SIGLIP_UNROLL
      for (int p = 0; p < 4; ++p)
        packed[p] = Element::pack(scaled(dz[i + 2 * p]), scaled(dz[i + 2 * p + 1]));
      stmatrix_x4(dz_smem + swizzled_offset(lane_, box_column / 8 + i / 4), packed[0], packed[1], packed[2], packed[3]);
    }
  }
  // Only float16 has a scale: bfloat16 has the exponents of float32.
  __device__ float scaled(float dz) const { return Element::kIsBfloat16 ? dz : dz * dz_scale_; }
  template <int kCount>
  __device__ void store_float32_dz(const float (&dz)[kCount], int row, int column) const {
    hide(row);
    hide(column);
    SIGLIP_UNROLL
    for (int k = 0; k < kThreadRows; ++k) {
      const int r = row + row_of(2 * k), c = column + column_of(0);
      float* const at = params_.float32_dz + (r * int(params_.dz_stride) + c);  // small: 32 bits do
      SIGLIP_UNROLL
      for (int i = 0; i < kCount; ++i) {
        const int offset = i / 4 * 8 + i % 2;  // the lane's columns have the same distances
        if (thread_row(i) == k && r < params_.rows && c + offset < params_.cols) at[offset] = dz[i];
      }
    }
  }

  const BlockParams& params_;
  const float scale_, bias_, dz_scale_;
  const int lane_;
  bool is_plain_ = false;  // the tile is whole, and its chunks may be plain
  GeneralPairs pairs_;
  Sums sums_;
  LogitStats stats_;
};

}  // namespace siglip::sm90
