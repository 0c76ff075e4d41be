// GEMM building blocks with float32 accumulators in AVX-512: bfloat16 by AVX512-BF16's vdpbf16ps, float32 by FMA.
#pragma once

#include <cstdint>

#include "params.h"

namespace siglip::avx512 {

// Operands are read along k in words of 32 bits: a pair of bfloat16, as in the VNNI layout, or one float32.
struct Bfloat16 {
  using Storage = uint16_t;
  static constexpr int64_t kElementsPerWord = 2;
};
struct Float32 {
  using Storage = float;
  static constexpr int64_t kElementsPerWord = 1;
};

template <class Element>
int64_t num_k_words(int64_t k) {
  return (k + Element::kElementsPerWord - 1) / Element::kElementsPerWord;
}

// b [k, n] is packed into panels of kNR columns, as wide as the microkernel: [panel, word of k, column]. Zeros pad the
// last word and the last panel.
constexpr int64_t kNR = 64;
inline int64_t num_panels(int64_t n) { return (n + kNR - 1) / kNR; }

// Packs the panel `columns` of b [k, n].
template <class Element>
void pack_panel(const typename Element::Storage* b, int64_t stride, int64_t k, Range columns, uint32_t* panel);
// The same of the transpose of b [n, k].
template <class Element>
void pack_transposed_panel(const typename Element::Storage* b, int64_t stride, int64_t k, Range columns,
                           uint32_t* panel);

// The operand a [rows, k]: strides of its rows and of its words along k.
struct OperandA {
  const char* data;
  int64_t row_bytes, word_bytes;
  bool last_word_is_padded;  // otherwise an odd k ends with half a word
};
template <class Storage>
OperandA row_major_a(const Storage* a, int64_t stride) {
  return {reinterpret_cast<const char*>(a), stride * int64_t(sizeof(Storage)), 4, false};
}

// Up to kNR columns of the operand b: a packed panel, or part of a row-major float32 matrix.
struct OperandB {
  const void* data;
  int64_t k_stride = kNR;  // in words, between the words of a column
};
// A panel read as the rows of its transpose.
inline OperandA transposed_panel_a(const OperandB& b) {
  return {static_cast<const char*>(b.data), 4, 4 * b.k_stride, true};
}

// out [rows, columns <= kNR] = a·b, or += with `accumulate`.
template <class Element>
void gemm_panel(const OperandA& a, const OperandB& b, int64_t k, float* out, int64_t out_stride, int64_t rows,
                int64_t columns, bool accumulate);

// out [rows, columns] = a·bᵀ for row-major a [rows, k] and b [columns, k], without packing.
template <class Element>
void gemm_nt(const typename Element::Storage* a, const typename Element::Storage* b, int64_t k, float* out,
             int64_t out_stride, int64_t rows, int64_t columns);

}  // namespace siglip::avx512
