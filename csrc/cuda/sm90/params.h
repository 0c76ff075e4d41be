// The launcher's parameters. siglip_kernels/backends/cuda.py fills them in: keep both in the same order.
#pragma once

#include <cstdint>

namespace siglip::sm90 {

enum class Dtype : int32_t { kBfloat16, kFloat16 };

// A block of the logits. Every pointer is to device memory.
struct BlockParams {
  const void* x;                // [rows, features], row stride x_stride
  const void* y;                // [cols, features], row stride y_stride
  void* dz;                     // [rows, cols], or null; a half-precision row's padding to 16 bytes is written too
  float* partials;              // [3, num_partials(rows, cols)]: loss, dz·u, dz; with loss_only just the first row
  float* stats;                 // [8, num_partials(rows, cols)] in the order of stats.py, or null
  const float* scale;           // one element, like bias and dz_scale
  const float* bias;
  const float* dz_scale;        // null: 1
  const int64_t* image_ids;     // [rows], or null
  const int64_t* text_ids;      // [cols]
  const float* image_weights;   // [rows], or null
  const float* text_weights;    // [cols]
  const float* image_masses;    // [rows], or null; with ids and weights
  const float* text_masses;     // [cols]
  int64_t x_stride, y_stride, dz_stride;  // in elements
  int32_t rows, cols, features;
  int32_t offset;               // (i, i + offset) is positive, unless ids say it
  int32_t ignore_ids;           // the offset says it, and other pairs of equal ids are left out
  int32_t soft_targets;         // masses are targets, not factors of the weight
  int32_t loss_only;            // compute no sums but the loss
  Dtype dtype;                  // of x and y, and of dz unless
  int32_t float32_dz;           // of less than 2^31 elements, and without dz_scale
  int32_t device;
};

}  // namespace siglip::sm90
