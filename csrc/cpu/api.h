// What Python calls, by ctypes: plain C, no torch headers, so that one build serves every version of torch.
#pragma once

#include <cstdint>

#define SIGLIP_API extern "C" __attribute__((visibility("default")))

namespace siglip {

// torch's own thread pool: at::parallel_for through its C shim.
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context);

// Bits of siglip_features().
enum Features : int64_t { kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 4, kAmxBf16 = 8 };
enum Labels : int64_t { kNone = 0, kOffset = 1, kIds = 2 };
enum Element : int64_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2 };

// One block of the logits: r images by c texts. T below is float, or double for float64 features.
struct Block {
  int64_t r, c;
  const void* u;            // [r, c] T: inner products; rows ldu apart
  int64_t ldu;
  void* dz;                 // [r, c] of dz_element, out; rows lddz apart. Null: not wanted
  int64_t lddz;
  int64_t dz_element;       // Element
  const void* scale;        // [] T
  const void* bias;         // [] T
  int64_t labels;           // Labels
  int64_t offset;           // kOffset: pair (i, i + offset) is positive
  const int64_t* image_ids; // [r], kIds
  const int64_t* text_ids;  // [c], kIds
  const void* image_weights;  // [r] T, or null; then both are
  const void* text_weights;   // [c] T, or null
  int64_t loss_only;
  double* sums;             // [3], out: loss, dz·u, dz
  ParallelFor parallel_for;
};

// out [m, n] float32 = or += a [m, k] times b [k, n], both bfloat16. A stride of 1 is in one dimension of each.
struct Product {
  int64_t m, n, k;
  const uint16_t* a;
  int64_t a_row, a_col;  // strides of a
  const uint16_t* b;
  int64_t b_row, b_col;
  float* out;
  int64_t ldo;
  int64_t accumulate;
  ParallelFor parallel_for;
};

}  // namespace siglip
