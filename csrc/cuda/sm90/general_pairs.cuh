// What ids, weights and masses say of one thread's pairs: those of two rows and of the four columns of a chunk.
#pragma once

#include "layout.h"
#include "params.h"
#include "ptx.cuh"
#include "sigmoid_loss.h"

namespace siglip::sm90 {

// Columns of a chunk, and a thread's share of it. Chunks are short, because registers hold all that they need.
constexpr int kGeneralChunkColumns = 16, kGeneralChunkPairs = kGeneralChunkColumns / 2;
constexpr int kThreadRows = 2, kThreadColumns = kGeneralChunkPairs / kThreadRows;

// Row and column of a thread's i-th pair of a chunk, among its own.
SIGLIP_HOST_DEVICE int thread_row(int i) { return i / 2 % 2; }
SIGLIP_HOST_DEVICE int thread_column(int i) { return i / 4 * 2 + i % 2; }

// Per image or per text. Beyond the last they repeat it.
template <int kCount>
struct SideValues {
  int index[kCount];
  bool in_bounds[kCount];
  int64_t ids[kCount];
  float weights[kCount], masses[kCount];

  __device__ void load(int k, int at, int length, const int64_t* all_ids, const float* all_weights,
                       const float* all_masses) {
    index[k] = at;
    in_bounds[k] = at < length;
    const int clamped = at < length ? at : length - 1;
    if (all_ids) ids[k] = all_ids[clamped];
    if (all_weights) weights[k] = all_weights[clamped];
    if (all_masses) masses[k] = all_masses[clamped];
  }
};

class GeneralPairs {
 public:
  __device__ GeneralPairs(const BlockParams& params, int lane) : params_(params), lane_(lane) {}

  __device__ void load_rows(int row) {
    SIGLIP_UNROLL
    for (int k = 0; k < kThreadRows; ++k)
      rows_.load(k, row + accumulator_row(lane_, 2 * k), params_.rows, params_.image_ids, params_.image_weights,
                 params_.image_masses);
  }
  // Whether position alone says what is positive.
  __device__ bool by_offset() const { return !params_.image_ids || params_.ignore_ids; }
  // Whether an id of the rows may be that of one of the thread's kPairs / 2 columns: their lower halves are equal.
  template <int kPairs>
  __device__ bool may_match(int column) const {
    if (!params_.image_ids) return false;
    bool matches[4] = {};  // four chains, for they wait for each other
    SIGLIP_UNROLL
    for (int k = 0; k < kPairs / kThreadRows; ++k) {
      const uint32_t id = uint32_t(params_.text_ids[column + accumulator_column(lane_, k / 2 * 4 + k % 2)]);
      SIGLIP_UNROLL
      for (int r = 0; r < kThreadRows; ++r) matches[k % 2 * 2 + r] |= id == uint32_t(rows_.ids[r]);
    }
    return matches[0] | matches[1] | matches[2] | matches[3];
  }
  // Then `positive` and `counted` are of this chunk.
  __device__ void load_columns(int column) {
    SIGLIP_UNROLL
    for (int k = 0; k < kThreadColumns; ++k)
      columns_.load(k, column + accumulator_column(lane_, k / 2 * 4 + k % 2), params_.cols, params_.text_ids,
                    params_.text_weights, params_.text_masses);
    positive = counted = 0;
    SIGLIP_UNROLL
    for (int i = 0; i < kGeneralChunkPairs; ++i) {
      const int r = thread_row(i), c = thread_column(i);
      const bool on_diagonal = rows_.index[r] + params_.offset == columns_.index[c];
      const bool same_id = params_.image_ids && rows_.ids[r] == columns_.ids[c];
      const bool is_positive = by_offset() ? on_diagonal : same_id;
      const bool is_ignored = params_.ignore_ids && same_id && !on_diagonal;
      positive |= uint32_t(is_positive) << i;
      counted |= uint32_t(rows_.in_bounds[r] && columns_.in_bounds[c] && !is_ignored) << i;
    }
  }

  // Bit i for the thread's i-th pair. counted: in bounds and not left out; positive ones need not be.
  uint32_t positive, counted;

  __device__ float weight(int i) const { return rows_.weights[thread_row(i)] * columns_.weights[thread_column(i)]; }
  // The counted pairs of which neither side has a weight of 0.
  __device__ uint32_t weighted() const {
    if (!params_.image_weights) return counted;
    uint32_t mask = 0;
    SIGLIP_UNROLL
    for (int i = 0; i < kGeneralChunkPairs; ++i)
      mask |= uint32_t(rows_.weights[thread_row(i)] != 0 && columns_.weights[thread_column(i)] != 0) << i;
    return mask & counted;
  }
  // The factors of softplus(a) and of softplus(-a) in a pair's term, both 0 for a pair that does not count.
  struct Parts {
    float mass, opposite;
  };
  __device__ Parts parts(int i) const {
    const bool is_positive = positive >> i & 1;
    const bool shares = params_.image_masses && is_positive;
    const float mass = shares ? rows_.masses[thread_row(i)] + columns_.masses[thread_column(i)] : 1.0f;
    const float label = !is_positive ? 0.0f : params_.soft_targets ? mass : 1.0f;
    // Without a difference that cancels, however small the smoothing is.
    const float smoothing = params_.label_smoothing, kept = 1 - smoothing;
    float toward = kept * label + smoothing * (1 - label), away = kept * (1 - label) + smoothing * label;
    if (params_.teacher) add_teacher(i, toward, away);
    toward *= params_.positive_weight;
    const float factor = params_.soft_targets ? 1.0f : mass;
    const float counts = counted >> i & 1 ? factor : 0.0f;
    return {counts * (is_positive ? toward : away), counts * (is_positive ? away : toward)};
  }

 private:
  // Mixes the teacher's sigmoid into the target of a pair, and what it leaves to 1 into the rest.
  __device__ void add_teacher(int i, float& toward, float& away) const {
    const int row = rows_.index[thread_row(i)], column = columns_.index[thread_column(i)];
    const bool in_bounds = row < params_.rows && column < params_.cols;
    const float u = in_bounds ? params_.teacher[row * params_.teacher_stride + column] : 0.0f;
    const float z = fmaf(u, *params_.teacher_scale, *params_.teacher_bias), e = exp2_approx(-fabsf(z) * kLog2E);
    const float weight = params_.teacher_weight, kept = 1 - weight, large = weight * rcp_approx(1 + e);
    toward = fmaf(kept, toward, large * (z < 0 ? e : 1));
    away = fmaf(kept, away, large * (z < 0 ? 1 : e));
  }

  const BlockParams& params_;
  const int lane_;
  SideValues<kThreadRows> rows_;
  SideValues<kThreadColumns> columns_;
};

// Σ z, number, least and largest z of the positives and of the negatives, as stats.py has them.
struct LogitStats {
  float sum[2] = {0, 0}, least[2] = {INFINITY, INFINITY}, largest[2] = {-INFINITY, -INFINITY};
  int count[2] = {0, 0};

  // Adds the pairs of the masks, bit i for z[i].
  template <int kCount>
  __device__ void add(const float (&z)[kCount], uint32_t positive, uint32_t negative) {
    count[0] += __popc(positive);
    count[1] += __popc(negative);
    SIGLIP_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (positive >> i & 1) add(z[i], 0);
      if (negative >> i & 1) add(z[i], 1);
    }
  }

 private:
  __device__ void add(float z, int kind) {
    sum[kind] += z;
    least[kind] = fminf(least[kind], z);
    largest[kind] = fmaxf(largest[kind], z);
  }
};

}  // namespace siglip::sm90
