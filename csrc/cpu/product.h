// Products into float32 in registers of 512 bits: of bfloat16 by AVX512-BF16's vdpbf16ps, of float32 by plain FMA.
#pragma once

#include <cstdint>

#include "block.h"

namespace siglip::avx512 {

// Operands are taken along k in words of 32 bits: a pair of bfloat16, or one float32.
struct Bfloat16 {
  using Element = uint16_t;
  static constexpr int64_t kInWord = 2;
};
struct Float32 {
  using Element = float;
  static constexpr int64_t kInWord = 1;
};

template <class Operand>
int64_t words(int64_t k) {
  return (k + Operand::kInWord - 1) / Operand::kInWord;
}

// A right-hand matrix [k, n] is packed into panels of 64 columns: panel, word of rows, column. Zeros fill the last word
// and the last panel.
constexpr int64_t kPanel = 64;
inline int64_t panels(int64_t n) { return (n + kPanel - 1) / kPanel; }

// One panel of b [k, n].
template <class Operand>
void pack_panel(const typename Operand::Element* b, int64_t stride, int64_t k, Range columns, uint32_t* panel);
// One panel of the transpose of b [n, k].
template <class Operand>
void pack_transposed_panel(const typename Operand::Element* b, int64_t stride, int64_t k, Range columns,
                           uint32_t* panel);

// A left-hand matrix [rows, k]: where its words lie.
struct Left {
  const char* data;
  int64_t row_bytes, word_bytes;
  bool last_word_is_padded;  // or ends with the row, half a word long
};
template <class Element>
Left row_major(const Element* a, int64_t stride) {
  return {reinterpret_cast<const char*>(a), stride * int64_t(sizeof(Element)), 4, false};
}

// Columns of a right-hand matrix: a panel; or as many of a row-major float32 matrix, whose words have another stride.
struct Right {
  const void* data;
  int64_t stride = kPanel;  // words from word to word of a column
};
// The same columns as rows of the transposed matrix.
inline Left transposed(const Right& b) { return {static_cast<const char*>(b.data), 4, 4 * b.stride, true}; }

// out [rows, columns <= kPanel] = a·b, or += where `accumulate`.
template <class Operand>
void multiply(const Left& a, const Right& b, int64_t k, float* out, int64_t out_stride, int64_t rows, int64_t columns,
              bool accumulate);

// out [rows, columns] = a·bᵀ of row-major a [rows, k] and b [columns, k], nothing packed.
template <class Operand>
void multiply_rows(const typename Operand::Element* a, const typename Operand::Element* b, int64_t k, float* out,
                   int64_t out_stride, int64_t rows, int64_t columns);

}  // namespace siglip::avx512
