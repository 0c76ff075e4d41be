// What the library is asked for. Filled in by siglip_kernels/backends/cpu.py: keep the two alike.
#pragma once

#include <cstdint>

namespace siglip {

enum class Dtype : int32_t { kFloat32, kFloat64, kBfloat16, kFloat16 };

// A block of the logits.
struct Block {
  int64_t rows, cols;
  const void* scale;            // one element of the logits' dtype, as bias and dz_scale
  const void* bias;
  const void* dz_scale;         // null: 1
  int64_t offset;               // (i, i + offset) is positive, unless there are ids
  const int64_t* image_ids;     // [rows], or null
  const int64_t* text_ids;      // [cols]
  const void* image_weights;    // [rows] logits' dtype, or null
  const void* text_weights;     // [cols]
  void* dz;                     // [rows, cols] operand dtype, or null
  int64_t dz_stride;            // elements from row to row
  double* sums;                 // [3]: loss, dz·u, dz
  Dtype logits;                 // float32 or float64
  Dtype operand;                // of dz
  int32_t loss_only;            // only sums[0] is wanted
  int32_t ignore_ids;           // the offset says what is positive, other pairs of equal ids are left out
  int32_t soft_targets;         // masses are targets, else factors of the weight
  const void* image_masses;     // [rows] logits' dtype, or null: given with ids and weights
  const void* text_masses;      // [cols]; a positive pair's mass is the sum of its two
  double* stats;                // [8], or null: Σ z, number, least z, largest z, each of positives and of negatives
  void* dx;                     // [rows, features] logits' dtype: dz·y, or null; siglip_epilogue forms neither
  void* dy;                     // [cols, features] logits' dtype: dzᵀ·x, or null
  int32_t dx_begun, dy_begun;   // added to what is there
};

constexpr int kSums = 3, kStats = 8;

// out = a·b, or += where `accumulate`; all row-major.
struct Product {
  float* out;                   // [m, n]
  const void* a;                // [m, k], or [k, m] where `transpose`
  int64_t a_stride;             // elements from row to row
  const void* b;                // [k, n]
  uint32_t* packed;             // room for b's panels, and for a's where `transpose`
  int64_t m, n, k;
  Dtype operand;                // of a and b
  int32_t transpose, accumulate;
};

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

}  // namespace siglip
