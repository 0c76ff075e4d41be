// 24 registers of sums; of the other 8, four hold the right-hand words and one the left-hand ones. Of packed operands they
// are 6 × 64 results; of rows as they are, sixteen partial sums of each of 6 × 4.
// Measured on a Zen 4 core: bfloat16 210 to 220 GFLOP/s, of 235 without loads, where oneDNN reaches 200 to 215.

#include "product.h"

#include <immintrin.h>

#include <utility>

namespace siglip::avx512 {
namespace {

constexpr int kVectors = kPanel / 16;
constexpr int kRows = 6;
// Of a pass over k, whose sums start from 0: one sum of 768 terms errs by more than the library's.
constexpr int64_t kWords = 128;

// body(0) … body(kCount - 1), unrolled before the compiler decides what stays in registers: sums that a loop indexes
// live on the stack, and go there and back once a pass.
template <class Body, int... kIndex>
[[gnu::always_inline]] inline void repeat(std::integer_sequence<int, kIndex...>, Body&& body) {
  (body(kIndex), ...);
}
template <int kCount, class Body>
[[gnu::always_inline]] inline void repeat(Body&& body) {
  repeat(std::make_integer_sequence<int, kCount>(), body);
}

[[gnu::always_inline]] inline __m512 multiply_add(Bfloat16, __m512i left, __m512i right, __m512 sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
}
[[gnu::always_inline]] inline __m512 multiply_add(Float32, __m512i left, __m512i right, __m512 sum) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right), sum);
}

__mmask32 first(int64_t count) { return count >= 32 ? ~0u : count > 0 ? (1u << count) - 1 : 0; }

template <class Operand, int kCount>
[[gnu::flatten]] void tile(const char* a, const Left& layout, const uint32_t* b, int64_t b_stride, int64_t whole_words,
                           bool half_word, float* out, int64_t out_stride, int64_t columns, bool accumulate) {
  __m512 sum[kCount][kVectors];
  repeat<kCount>([&](int i) { repeat<kVectors>([&](int v) { sum[i][v] = _mm512_setzero_ps(); }); });

  const auto step = [&](auto word_at) {
    __m512i right[kVectors];
    repeat<kVectors>([&](int v) { right[v] = _mm512_loadu_si512(b + 16 * v); });
    repeat<kCount>([&](int i) {
      const __m512i left = _mm512_set1_epi32(word_at(a + i * layout.row_bytes));
      repeat<kVectors>([&](int v) { sum[i][v] = multiply_add(Operand(), left, right[v], sum[i][v]); });
    });
  };
  for (int64_t w = 0; w < whole_words; ++w, a += layout.word_bytes, b += b_stride)
    step([](const char* at) { return _mm_cvtsi128_si32(_mm_loadu_si32(at)); });
  if (half_word) step([](const char* at) { return _mm_extract_epi16(_mm_loadu_si16(at), 0); });

  repeat<kCount>([&](int i) {
    repeat<kVectors>([&](int v) {
      float* const to = out + i * out_stride + 16 * v;
      const __mmask16 mask = first(columns - 16 * v);
      if (accumulate) sum[i][v] = _mm512_add_ps(sum[i][v], _mm512_maskz_loadu_ps(mask, to));
      if (columns >= kPanel)  // masked stores are slow
        _mm512_storeu_ps(to, sum[i][v]);
      else
        _mm512_mask_storeu_ps(to, mask, sum[i][v]);
    });
  });
}

template <class Operand>
constexpr decltype(&tile<Operand, 1>) kTiles[kRows] = {tile<Operand, 1>, tile<Operand, 2>, tile<Operand, 3>,
                                                       tile<Operand, 4>, tile<Operand, 5>, tile<Operand, 6>};

// The four vectors' sums.
__m128 sums_of(const __m512 (&v)[kVectors]) {
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512 quarters = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

// Of rows of `bytes` bytes, one after the other.
template <class Operand, int kCount>
[[gnu::flatten]] void row_tile(const char* a, const char* b, int64_t bytes, float* out, int64_t out_stride,
                               int64_t columns) {
  const char* column[kVectors];
  for (int j = 0; j < kVectors; ++j) column[j] = b + (j < columns ? j : columns - 1) * bytes;
  __m512 sum[kCount][kVectors];
  repeat<kCount>([&](int i) { repeat<kVectors>([&](int v) { sum[i][v] = _mm512_setzero_ps(); }); });

  const auto step = [&](int64_t at, auto words_at) {
    __m512i right[kVectors];
    repeat<kVectors>([&](int j) { right[j] = words_at(column[j] + at); });
    repeat<kCount>([&](int i) {
      const __m512i left = words_at(a + i * bytes + at);
      repeat<kVectors>([&](int j) { sum[i][j] = multiply_add(Operand(), left, right[j], sum[i][j]); });
    });
  };
  int64_t at = 0;
  for (; at + 64 <= bytes; at += 64) step(at, [](const char* from) { return _mm512_loadu_si512(from); });
  const __mmask32 rest = first((bytes - at) / 2);
  if (rest) step(at, [&](const char* from) { return _mm512_maskz_loadu_epi16(rest, from); });

  const __mmask8 mask = first(columns) & 0xf;
  repeat<kCount>([&](int i) { _mm_mask_storeu_ps(out + i * out_stride, mask, sums_of(sum[i])); });
}

template <class Operand>
constexpr decltype(&row_tile<Operand, 1>) kRowTiles[kRows] = {row_tile<Operand, 1>, row_tile<Operand, 2>,
                                                              row_tile<Operand, 3>, row_tile<Operand, 4>,
                                                              row_tile<Operand, 5>, row_tile<Operand, 6>};

// 16 × 16 words: in step s, the blocks of s × s either side of the diagonal change places.
void transpose(__m512i (&row)[16]) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (int s = 1; s < 16; s *= 2) {
    const __mmask16 odd = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(s));
    const __m512i upper = _mm512_mask_add_epi32(lane, odd, lane, _mm512_set1_epi32(16 - s));
    const __m512i lower = _mm512_mask_add_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(s)), odd, lane,
                                                _mm512_set1_epi32(16));
    for (int i = 0; i < 16; ++i) {
      if (i & s) continue;
      const __m512i first = row[i], second = row[i + s];
      row[i] = _mm512_permutex2var_epi32(first, upper, second);
      row[i + s] = _mm512_permutex2var_epi32(first, lower, second);
    }
  }
}

__m512i word_of_rows(Float32, const float* row, int64_t, bool, __mmask16 mask) {
  return _mm512_maskz_loadu_epi32(mask, row);
}
__m512i word_of_rows(Bfloat16, const uint16_t* row, int64_t stride, bool has_second, __mmask16 mask) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(has_second ? mask : 0, row + stride));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

}  // namespace

template <class Operand>
void pack_panel(const typename Operand::Element* b, int64_t stride, int64_t k, Range columns, uint32_t* panel) {
  for (int64_t row = 0; row < k; row += Operand::kInWord, panel += kPanel)
    for (int v = 0; v < kVectors; ++v) {
      const __mmask16 mask = __mmask16(first(columns.size() - 16 * v) & 0xffff);
      const auto* at = b + row * stride + columns.begin + 16 * v;
      _mm512_storeu_si512(panel + 16 * v, word_of_rows(Operand(), at, stride, row + 1 < k, mask));
    }
}

template <class Operand>
void pack_transposed_panel(const typename Operand::Element* b, int64_t stride, int64_t k, Range columns,
                           uint32_t* panel) {
  constexpr int64_t kHalves = 2 / Operand::kInWord;  // of a word, in an element
  const int64_t all = words<Operand>(k);
  for (int64_t start = 0; start < all; start += 16, panel += 16 * kPanel) {
    const __mmask32 mask = first(k * kHalves - 2 * start);
    for (int v = 0; v < kVectors; ++v) {
      __m512i row[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t column = columns.begin + 16 * v + i;
        row[i] = column < columns.end ? _mm512_maskz_loadu_epi16(mask, b + column * stride + start * Operand::kInWord)
                                      : _mm512_setzero_si512();
      }
      transpose(row);
      for (int i = 0; i < 16 && start + i < all; ++i) _mm512_storeu_si512(panel + i * kPanel + 16 * v, row[i]);
    }
  }
}

template <class Operand>
void multiply(const Left& a, const Right& b, int64_t k, float* out, int64_t out_stride, int64_t rows, int64_t columns,
              bool accumulate) {
  const bool half = k % Operand::kInWord && !a.last_word_is_padded;
  const int64_t whole = words<Operand>(k) - half, passes = whole > kWords ? (whole + kWords - 1) / kWords : 1;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const Range part{whole * pass / passes, whole * (pass + 1) / passes};
    const auto* const words_of_b = static_cast<const uint32_t*>(b.data) + part.begin * b.stride;
    for (int64_t i = 0; i < rows; i += kRows) {
      const int64_t count = rows - i < kRows ? rows - i : kRows;
      kTiles<Operand>[count - 1](a.data + i * a.row_bytes + part.begin * a.word_bytes, a, words_of_b, b.stride,
                                 part.size(), half && pass == passes - 1, out + i * out_stride, out_stride, columns,
                                 accumulate || pass > 0);
    }
  }
}

template <class Operand>
void multiply_rows(const typename Operand::Element* a, const typename Operand::Element* b, int64_t k, float* out,
                   int64_t out_stride, int64_t rows, int64_t columns) {
  const int64_t bytes = k * sizeof(*a);
  for (int64_t i = 0; i < rows; i += kRows) {
    const auto row_tile = kRowTiles<Operand>[(rows - i < kRows ? rows - i : kRows) - 1];
    for (int64_t j = 0; j < columns; j += kVectors)
      row_tile(reinterpret_cast<const char*>(a + i * k), reinterpret_cast<const char*>(b + j * k), bytes,
               out + i * out_stride + j, out_stride, columns - j);
  }
}

#define SIGLIP_INSTANTIATE(Operand)                                                                                \
  template void pack_panel<Operand>(const Operand::Element*, int64_t, int64_t, Range, uint32_t*);                  \
  template void pack_transposed_panel<Operand>(const Operand::Element*, int64_t, int64_t, Range, uint32_t*);       \
  template void multiply<Operand>(const Left&, const Right&, int64_t, float*, int64_t, int64_t, int64_t, bool);    \
  template void multiply_rows<Operand>(const Operand::Element*, const Operand::Element*, int64_t, float*, int64_t, \
                                       int64_t, int64_t);
SIGLIP_INSTANTIATE(Bfloat16)
SIGLIP_INSTANTIATE(Float32)

}  // namespace siglip::avx512
