// The launcher's parameters. siglip_kernels/backends/cuda.py fills them in: keep both in the same order.
#pragma once

#include <cstdint>

namespace siglip::sm90 {

enum class Dtype : int32_t { kBfloat16, kFloat16 };

// A block of the logits. Every pointer is to device memory.
struct BlockParams {
  const void* x;                // [rows, features], row stride x_stride
  const void* y;                // [cols, features], row stride y_stride
  void* dz;                     // [rows, cols], or null; a row's padding to 16 bytes is written too (tma_store_2d)
  float* partials;              // [3, num_partials(rows, cols)]: loss, dz·u, dz; with loss_only just the first row
  const float* scale;           // one element, like bias and dz_scale
  const float* bias;
  const float* dz_scale;        // null: 1
  const int64_t* image_ids;     // [rows], or null
  const int64_t* text_ids;      // [cols]
  const float* image_weights;   // [rows], or null
  const float* text_weights;    // [cols]
  int64_t x_stride, y_stride, dz_stride;  // in elements
  int32_t rows, cols, features;
  int32_t offset;               // (i, i + offset) is positive, unless there are ids
  int32_t loss_only;            // compute no sums but the loss
  Dtype dtype;                  // of x, y and dz
  int32_t device;
};

}  // namespace siglip::sm90
