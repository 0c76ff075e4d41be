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
constexpr int64_t kGroup = 8;                                      // panels of A that meet a panel of B while it is in L2

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

inline uint32_t pair(const Vectors& v, int64_t index, int64_t k) {
  const uint16_t* p = v.data + index * v.between + k * v.along;
  return static_cast<uint32_t>(p[0]) | (k + 1 < v.k ? static_cast<uint32_t>(p[v.along]) << 16 : 0);
}

// Pairs of k lie beside one another: 16 vectors by 16 pairs at a time would be a transposition; the cache does it here.
void pack_along(const Vectors& v, int64_t first, int64_t width, uint32_t* panel) {
  const int64_t whole = v.k / 2, present = std::min(width, v.count - first);
  for (int64_t w = 0; w < present; ++w) {
    const uint16_t* source = v.data + (first + w) * v.between;
    for (int64_t k = 0; k < whole; ++k) std::memcpy(panel + k * width + w, source + 2 * k, sizeof(uint32_t));
  }
}

// Vectors lie beside one another: two rows of k are interleaved.
void pack_between(const Vectors& v, int64_t first, int64_t width, uint32_t* panel) {
  const int64_t whole = v.k / 2, present = std::min(width, v.count - first);
  for (int64_t k = 0; k < whole; ++k) {
    const uint16_t* even = v.data + 2 * k * v.along + first;
    const uint16_t* odd = even + v.along;
    uint32_t* out = panel + k * width;
    for (int64_t w = 0; w < present; ++w) out[w] = even[w] | static_cast<uint32_t>(odd[w]) << 16;
  }
}

void pack_panel(const Vectors& v, int64_t first, int64_t width, uint32_t* panel) {
  const int64_t pairs = ceil_div(v.k, 2), present = std::min(width, v.count - first);
  if (present < width) std::fill(panel, panel + pairs * width, 0);
  (v.along == 1 ? pack_along : pack_between)(v, first, width, panel);
  if (v.k % 2 != 0) {
    for (int64_t w = 0; w < present; ++w) panel[(pairs - 1) * width + w] = pair(v, first + w, v.k - 1);
  }
}

struct Packed {
  Buffer<uint32_t> data;
  int64_t size;  // of a panel
  const uint32_t* panel(int64_t index) const { return data.get() + index * size; }
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

Packed pack(const Vectors& v, int64_t width, ParallelFor parallel_for) {
  const int64_t panels = ceil_div(v.count, width), size = ceil_div(v.k, 2) * width;
  Packed packed{allocate<uint32_t>(panels * size), size};
  parallel(parallel_for, panels, [&](int64_t i) { pack_panel(v, i * width, width, packed.data.get() + i * size); });
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
      const int64_t left = cols - 16 * j;
      const __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
      float* target = out + i * ldo + 16 * j;
      const __m512 before = accumulate ? _mm512_maskz_loadu_ps(mask, target) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(target, mask, _mm512_add_ps(sum[i][j], before));
    }
  }
}

// A group of panels of A times all of B.
void group_product(const Packed& a, const Packed& b, int64_t pairs, int64_t group, int64_t m, int64_t n, float* out,
                   int64_t ldo, bool accumulate) {
  const int64_t first = group * kGroup, last = std::min(first + kGroup, ceil_div(m, kRows));
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
  const Packed a = pack({p->a, p->m, p->k, p->a_row, p->a_col}, kRows, p->parallel_for);
  const Packed b = pack({p->b, p->n, p->k, p->b_col, p->b_row}, kCols, p->parallel_for);
  parallel(p->parallel_for, ceil_div(p->m, kRows * kGroup), [&](int64_t group) {
    group_product(a, b, ceil_div(p->k, 2), group, p->m, p->n, p->out + group * kGroup * kRows * p->ldo, p->ldo,
                  p->accumulate != 0);
  });
}

// The block kernel: x [r, k] times y [c, k] transposed, then the epilogue over each group of rows. `block.u` is not read.
SIGLIP_API void siglip_block_bf16(const siglip::Block* block, const siglip::Product* p) {
  using namespace siglip;
  const Packed a = pack({p->a, p->m, p->k, p->a_row, p->a_col}, kRows, p->parallel_for);
  const Packed b = pack({p->b, p->n, p->k, p->b_col, p->b_row}, kCols, p->parallel_for);
  constexpr int64_t kHeight = kRows * kGroup;
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
