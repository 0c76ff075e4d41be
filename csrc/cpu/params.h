// The library's parameters. siglip_kernels/backends/cpu_native.py fills BlockParams in: keep both in the same order.
#pragma once

#include <cstdint>

namespace siglip {

enum class Dtype : int32_t { kFloat32, kFloat64, kBfloat16, kFloat16 };

// A block of the logits.
struct BlockParams {
  int64_t rows, cols;
  const void* scale;            // one element of the logits' dtype, like bias and dz_scale
  const void* bias;
  const void* dz_scale;         // null: 1
  int64_t offset;               // (i, i + offset) is positive, unless there are ids
  const int64_t* image_ids;     // [rows], or null
  const int64_t* text_ids;      // [cols]
  const void* image_weights;    // [rows] logits' dtype, or null
  const void* text_weights;     // [cols]
  void* dz;                     // [rows, cols] operand dtype, or null
  int64_t dz_stride;            // row stride in elements
  double* sums;                 // [3]: loss, dz·u, dz
  Dtype logits;                 // float32 or float64
  Dtype operand;                // dtype of dz
  int32_t loss_only;            // compute only sums[0]
  int32_t ignore_ids;           // positives are given by the offset, and other pairs with equal ids are left out
  int32_t soft_targets;         // masses are targets; otherwise they multiply the weight
  const void* image_masses;     // [rows] logits' dtype, or null; only with ids and weights
  const void* text_masses;      // [cols]; the mass of a positive pair is the sum of both
  int32_t has_balance;          // only with weights; without it the next two are not read
  double positive_weight;       // factor of every part of a term that the target weighs
  double label_smoothing;       // ε: the target is ε + (1 - 2ε)·label
  const void* teacher;          // [rows, cols] logits' dtype, or null: a teacher's inner products; only with weights
  int64_t teacher_stride;       // row stride in elements
  const void* teacher_scale;    // one element of the logits' dtype, like the bias
  const void* teacher_bias;
  double teacher_weight;        // λ: the target is (1 - λ)·what the labels say + λ·the teacher's sigmoid
  double* image_losses;         // [ceil(cols / kTileColumns), rows], or null; only with loss_only. At first 0
  double* stats;                // [8], or null: Σ z, count, min z, max z, each for positives and then negatives
  void* dx;                     // [rows, features] logits' dtype: dz·y, or null; siglip_epilogue ignores dx and dy
  void* dy;                     // [cols, features] logits' dtype: dzᵀ·x, or null
  int32_t dx_begun, dy_begun;   // accumulate into dx, dy
};

// Columns of the largest tile.
constexpr int64_t kTileColumns = 256;

constexpr int kNumSums = 3, kNumStats = 8;

// out = a·b, or += with `accumulate`. Every matrix is row-major.
struct GemmParams {
  float* out;                   // [m, n]
  const void* a;                // [m, k], or [k, m] with `transpose_a`
  int64_t a_stride;             // row stride in elements
  const void* b;                // [k, n]
  uint32_t* packed;             // buffer for the panels of b, then with `transpose_a` for those of a
  int64_t m, n, k;
  Dtype operand;                // dtype of a and b
  int32_t transpose_a, accumulate;
};

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

}  // namespace siglip
