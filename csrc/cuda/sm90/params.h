// The kernel's parameters. siglip_kernels/backends/cuda/kernels.py fills them in: keep both in the same order.
#pragma once

#include "host_device.h"

namespace siglip::sm90 {

// CUtensorMap, which the driver encodes.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// A block of the logits. Every pointer is to device memory.
struct BlockParams {
  float* partials;              // [3, kPartialsPerTile · tiles]: loss, dz·u, dz; for the loss alone just the first row
  float* stats;                 // [8, kPartialsPerTile · tiles] in the order of stats.py, for Pairs::kStats
  float* float32_dz;            // [rows, cols] of less than 2^31 elements, for Output::kFloat32Dz, which has no dz_scale
  const float* scale;           // one element, like bias and dz_scale
  const float* bias;
  const float* dz_scale;        // null: 1
  const int64_t* image_ids;     // [rows], or null
  const int64_t* text_ids;      // [cols]
  const float* image_weights;   // [rows], or null
  const float* text_weights;    // [cols]
  const float* image_masses;    // [rows], or null; with ids and weights
  const float* text_masses;     // [cols]
  const float* teacher;         // [rows, cols] a teacher's inner products, or null; with weights
  const float* teacher_scale;   // one element, like teacher_bias
  const float* teacher_bias;
  int64_t teacher_stride;       // in elements
  int64_t dz_stride;            // of float32_dz, in elements
  int32_t rows, cols, features;
  int32_t offset;               // (i, i + offset) is positive, unless ids say it
  int32_t ignore_ids;           // the offset says it, and other pairs of equal ids are left out
  int32_t soft_targets;         // masses are targets, not factors of the weight
  float positive_weight;        // other than 1 only with weights; so
  float label_smoothing;        // other than 0
  float teacher_weight;         // λ: the target is (1 - λ)·what the labels say + λ·the teacher's sigmoid
};

}  // namespace siglip::sm90
