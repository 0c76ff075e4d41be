// What the launcher is asked for. Filled in by siglip_kernels/backends/cuda.py: keep the two alike.
#pragma once

#include <cstdint>

namespace siglip::sm90 {

enum class Dtype : int32_t { kBfloat16, kFloat16 };

// A block of the logits; everything it points to is on the device.
struct Block {
  const void* x;                // [rows, features], rows x_stride elements apart
  const void* y;                // [cols, features]
  void* dz;                     // [rows, cols], or null; rows end on 16 bytes, which are written whole (ptx.cuh)
  float* partials;              // [3, kPartials · tiles]: loss, dz·u, dz; only the first row where loss_only
  const float* scale;           // one element, as bias and dz_scale
  const float* bias;
  const float* dz_scale;        // null: 1
  const int64_t* image_ids;     // [rows], or null
  const int64_t* text_ids;      // [cols]
  const float* image_weights;   // [rows], or null
  const float* text_weights;    // [cols]
  int64_t x_stride, y_stride, dz_stride;
  int32_t rows, cols, features;
  int32_t offset;               // (i, i + offset) is positive, unless there are ids
  int32_t loss_only;            // only the losses are wanted
  Dtype dtype;                  // of x, y and dz
  int32_t device;
};

// Sums that a tile leaves: one of each warp that worked on it.
constexpr int kPartials = 4;

}  // namespace siglip::sm90
