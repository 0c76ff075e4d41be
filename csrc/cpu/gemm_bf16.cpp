// bfloat16 products into float32 by AVX-512's dpbf16, and the block kernel over them, its logits never leaving L2.
//
// Both operands are packed into panels of pairs: panel[k / 2][width][2], so that one instruction multiplies 16 columns by
// two neighbouring k. A panel of A is kRows wide, one of B kCols; what is ragged is packed with zeros.
#include <immintrin.h>

#include <algorithm>
#include <memory>

#include "epilogue.h"

namespace siglip {
namespace {

constexpr int64_t kRows = 6, kVectors = 4, kCols = 16 * kVectors;  // 24 accumulators
constexpr int64_t kRowPanels = 8;  // panels of A that meet a panel of B while it is in L2
constexpr int64_t kHeight = kRows * kRowPanels;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> allocate(int64_t count) {
  const size_t bytes = static_cast<size_t>(ceil_div(count * static_cast<int64_t>(sizeof(T)), 64) * 64);
  return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64))));
}

// A matrix seen as `count` vectors of length k: rows of A or columns of B.
struct Vectors {
  const uint16_t* data;
  int64_t count, k;
  int64_t between, along;  // strides from vector to vector, and from one k to the next: one of them is 1
};

// The 16 × 16 words of `rows`, transposed in place.
inline void transpose(__m512i rows[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// Panels of kWidth vectors. Every store is of 16 words, in the order of k: what it writes beyond its own k, the next k
// overwrites. (Masked stores are slow on some processors.)
template <int64_t kWidth>
struct Packed {
  static constexpr int64_t kGroup = kWidth == kRows ? kRowPanels : 1;  // panels packed at a time
  static constexpr int64_t kStep = kWidth < 16 ? kWidth : 16;
  Buffer<uint32_t> data;
  int64_t size;  // of a panel: 16 words more than its content, which the last store may touch

  uint32_t* panel(int64_t index) const { return data.get() + index * size; }

  // Pairs of k lie beside one another: up to 16 vectors by 16 pairs at a time.
  void pack_along(const Vectors& v, int64_t index) const {
    const int64_t pairs = v.k / 2, first = index * kWidth, present = std::min(kWidth, v.count - first);
    for (int64_t w = 0; w < kWidth; w += kStep) {
      for (int64_t k = 0; k < pairs; k += 16) {
        __m512i block[16];
        for (int64_t i = 0; i < 16; ++i) {
          const __mmask16 mask = i < kStep && w + i < present ? first_lanes(pairs - k) : 0;
          block[i] = _mm512_maskz_loadu_epi32(mask, v.data + (first + w + i) * v.between + 2 * k);
        }
        transpose(block);
        uint32_t* out = panel(index) + k * kWidth + w;
        for (int64_t i = 0; i < std::min(pairs - k, int64_t{16}); ++i) _mm512_storeu_si512(out + i * kWidth, block[i]);
      }
    }
  }

  // Vectors lie beside one another: two neighbouring k are interleaved, over several panels while they are in the cache.
  void pack_between(const Vectors& v, int64_t begin, int64_t end) const {
    for (int64_t k = 0; k < v.k / 2; ++k) {
      const uint16_t* row = v.data + 2 * k * v.along;
      for (int64_t index = begin; index < end; ++index) {
        uint32_t* out = panel(index) + k * kWidth;
        for (int64_t w = 0; w < kWidth; w += kStep) {
          const int64_t first = index * kWidth + w;
          const __mmask16 lanes = first_lanes(std::min(kStep, v.count - first));
          const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, row + first));
          const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, row + v.along + first));
          _mm512_storeu_si512(out + w, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
      }
    }
  }

  // What is beyond the last vector is zero, and so is the partner of an odd last k.
  void pack_group(const Vectors& v, int64_t group) const {
    const int64_t begin = group * kGroup, end = std::min(begin + kGroup, ceil_div(v.count, kWidth));
    if (v.along != 1) pack_between(v, begin, end);
    for (int64_t index = begin; index < end; ++index) {
      if (v.along == 1) pack_along(v, index);
      if (v.k % 2 == 0) continue;
      for (int64_t w = 0; w < kWidth; ++w) {
        const int64_t vector = index * kWidth + w;
        const uint32_t last = vector < v.count ? v.data[vector * v.between + (v.k - 1) * v.along] : 0;
        panel(index)[v.k / 2 * kWidth + w] = last;
      }
    }
  }
};

template <class Body>
void parallel(ParallelFor parallel_for, int64_t count, const Body& body) {
  parallel_for(
      0, count, 1,
      [](int64_t begin, int64_t end, void* context) {
        for (int64_t i = begin; i < end; ++i) (*static_cast<const Body*>(context))(i);
      },
      const_cast<Body*>(&body));
}

template <int64_t kWidth>
Packed<kWidth> pack(const Vectors& v, ParallelFor parallel_for) {
  const int64_t size = ceil_div(v.k, 2) * kWidth + 16;
  Packed<kWidth> packed{allocate<uint32_t>(ceil_div(v.count, kWidth) * size), size};
  const int64_t groups = ceil_div(ceil_div(v.count, kWidth), packed.kGroup);
  parallel(parallel_for, groups, [&](int64_t group) { packed.pack_group(v, group); });
  return packed;
}

// out [rows, cols] of at most kRows × kCols = or += a panel of A times a panel of B.
void tile(const uint32_t* a, const uint32_t* b, int64_t pairs, float* out, int64_t ldo, int64_t rows, int64_t cols,
          bool accumulate) {
  __m512 sum[kRows][kVectors];
  for (auto& line : sum) {
    for (auto& v : line) v = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < pairs; ++k) {
    __m512bh right[kVectors];
    for (int j = 0; j < kVectors; ++j) right[j] = (__m512bh)_mm512_load_si512(b + k * kCols + 16 * j);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[k * kRows + i]));
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    if (i >= rows) break;
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const __mmask16 mask = first_lanes(cols - 16 * j);
      float* target = out + i * ldo + 16 * j;
      const __m512 before = accumulate ? _mm512_maskz_loadu_ps(mask, target) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(target, mask, _mm512_add_ps(sum[i][j], before));
    }
  }
}

// A group of panels of A times all of B.
void group_product(const Packed<kRows>& a, const Packed<kCols>& b, int64_t pairs, int64_t group, int64_t m, int64_t n, float* out,
                   int64_t ldo, bool accumulate) {
  const int64_t first = group * kRowPanels, last = std::min(first + kRowPanels, ceil_div(m, kRows));
  for (int64_t j = 0; j < ceil_div(n, kCols); ++j) {
    for (int64_t i = first; i < last; ++i) {
      tile(a.panel(i), b.panel(j), pairs, out + (i - first) * kRows * ldo + j * kCols, ldo,
           std::min(kRows, m - i * kRows), std::min(kCols, n - j * kCols), accumulate);
    }
  }
}

}  // namespace
}  // namespace siglip

SIGLIP_API void siglip_product_bf16(const siglip::Product* p) {
  using namespace siglip;
  const auto a = pack<kRows>({p->a, p->m, p->k, p->a_row, p->a_col}, p->parallel_for);
  const auto b = pack<kCols>({p->b, p->n, p->k, p->b_col, p->b_row}, p->parallel_for);
  parallel(p->parallel_for, ceil_div(p->m, kHeight), [&](int64_t group) {
    group_product(a, b, ceil_div(p->k, 2), group, p->m, p->n, p->out + group * kHeight * p->ldo, p->ldo,
                  p->accumulate != 0);
  });
}

// The block kernel: x [r, k] times y [c, k] transposed, then the epilogue over each group of rows. `block.u` is not read.
SIGLIP_API void siglip_block_bf16(const siglip::Block* block, const siglip::Product* p) {
  using namespace siglip;
  const auto a = pack<kRows>({p->a, p->m, p->k, p->a_row, p->a_col}, p->parallel_for);
  const auto b = pack<kCols>({p->b, p->n, p->k, p->b_col, p->b_row}, p->parallel_for);
  for_each_strip(*block, kHeight, [&](int64_t first, int64_t last, double* partials) {
    const Buffer<float> u = allocate<float>(kHeight * block->c);
    std::vector<float> signs(static_cast<size_t>(block->c), 1.0f);
    for (int64_t group = first; group < last; ++group) {
      group_product(a, b, ceil_div(p->k, 2), group, p->m, p->n, u.get(), block->c, false);
      const int64_t begin = group * kHeight, end = std::min(begin + kHeight, block->r);
      rows<float, uint16_t>(*block, begin, end, u.get(), block->c, signs.data(), partials + 3 * group);
    }
  });
}
