#include "interface.h"

#include <algorithm>
#include <array>
#include <vector>

#include "product.h"

namespace siglip {
namespace {

using Epilogue = decltype(&portable::epilogue);

// MKL's products for AMX run anywhere, the epilogue does not.
Level usable(int32_t level) {
  static const Level best = this_machine().level;
  return std::min(static_cast<Level>(level), best);
}

Epilogue epilogue_of(Level level) {
#if defined(__x86_64__)
  if (level >= Level::kAvx512) return avx512::epilogue;
  if (level == Level::kAvx2) return avx2::epilogue;
#endif
  (void)level;
  return portable::epilogue;
}

// Runs partial(task, sums) for every task and adds the sums up in the tasks' order, whoever ran them.
template <int kSize, class Partial>
void sum_tasks_of(ParallelFor pool, int64_t tasks, int64_t work, const Block& block, Partial&& partial) {
  std::vector<std::array<double, kSize>> parts(tasks);
  for_each_task(pool, tasks, work, [&](int64_t task) { partial(task, parts[task].data()); });
  for (int s = 0; s < kSums; ++s) {
    block.sums[s] = 0;
    for (const auto& part : parts) block.sums[s] += part[s];
  }
  if constexpr (kSize > kSums)
    for (int s = 0; s < kStats; ++s) {
      double& total = block.stats[s] = parts[0][kSums + s];
      for (int64_t task = 1; task < tasks; ++task) {
        const double value = parts[task][kSums + s];
        total = s < 4 ? total + value : s < 6 ? std::min(total, value) : std::max(total, value);
      }
    }
}

template <class Partial>
void sum_tasks(ParallelFor pool, int64_t tasks, int64_t work, const Block& block, Partial&& partial) {
  block.stats ? sum_tasks_of<kSums + kStats>(pool, tasks, work, block, partial)
              : sum_tasks_of<kSums>(pool, tasks, work, block, partial);
}

// Picoseconds of one thread, about: a pair's epilogue, a packed word, a word's multiplication with another.
constexpr int64_t kPair = 500, kPackedWord = 200, kMultiplied = 20;

// Row-major, or the transpose of that.
struct Matrix {
  const void* data;
  int stride;  // elements from row to row
  bool transpose;

  Matrix(const void* data, int64_t stride, bool transpose = false)
      : data(data), stride(int(std::max<int64_t>(stride, 1))), transpose(transpose) {}
};

struct Blas {
  Gemm gemm;
  Dtype operand;

  // out [m, n] = a·b, or += where `accumulate`: column by column, as Fortran has it, outᵀ [n, m] = bᵀ·aᵀ.
  void multiply(void* out, int64_t out_stride, const Matrix& a, const Matrix& b, int64_t m, int64_t n, int64_t k,
                bool accumulate) const {
    const int sizes[] = {int(n), int(m), int(k)}, ldc = int(std::max<int64_t>(out_stride, 1));
    if (operand == Dtype::kFloat64) return fortran<double>(out, ldc, b, a, sizes, accumulate);
    if (operand == Dtype::kFloat32) return fortran<float>(out, ldc, b, a, sizes, accumulate);
    using Cblas = void (*)(int, int, int, int, int, int, float, const void*, int, const void*, int, float, void*, int);
    constexpr int kColumnMajor = 102, kNoTrans = 111, kTrans = 112;
    reinterpret_cast<Cblas>(gemm)(kColumnMajor, b.transpose ? kTrans : kNoTrans, a.transpose ? kTrans : kNoTrans,
                                  sizes[0], sizes[1], sizes[2], 1, b.data, b.stride, a.data, a.stride, accumulate, out,
                                  ldc);
  }

 private:
  template <class T>
  void fortran(void* c, int ldc, const Matrix& a, const Matrix& b, const int (&sizes)[3], T beta) const {
    using Fortran = void (*)(const char*, const char*, const int*, const int*, const int*, const T*, const void*,
                             const int*, const void*, const int*, const T*, void*, const int*);
    const T alpha = 1;
    reinterpret_cast<Fortran>(gemm)(a.transpose ? "T" : "N", b.transpose ? "T" : "N", &sizes[0], &sizes[1], &sizes[2],
                                    &alpha, a.data, &a.stride, b.data, &b.stride, &beta, c, &ldc);
  }
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
Range part(int64_t index, int64_t size, int64_t end) { return {index * size, std::min(end, (index + 1) * size)}; }

}  // namespace

void siglip_machine(Machine* machine) { *machine = this_machine(); }

void siglip_epilogue(const Block* block, const void* u, int64_t u_stride, int32_t level, ParallelFor pool) {
  constexpr int64_t kPairs = 16384;  // a task
  const Epilogue epilogue = epilogue_of(usable(level));
  const int64_t rows = std::max<int64_t>(1, kPairs / std::max<int64_t>(1, block->cols));
  const int64_t size = block->logits == Dtype::kFloat64 ? 8 : 4;
  const int64_t work = block->rows * block->cols * kPair;
  sum_tasks(pool, ceil_div(block->rows, rows), work, *block, [&](int64_t task, double* sums) {
    const Range range = part(task, rows, block->rows);
    epilogue(*block, static_cast<const char*>(u) + range.begin * u_stride * size, u_stride, range, {0, block->cols},
             sums);
  });
}

void siglip_block_by_blas(const Block* block, const void* x, const void* y, int64_t features, void* u,
                          int64_t u_stride, Gemm gemm, int32_t level, ParallelFor pool) {
  const int64_t rows = block->rows, cols = block->cols;
  const Blas blas{gemm, block->operand};
  const Matrix dz{block->dz, block->dz_stride};
  blas.multiply(u, u_stride, {x, features}, {y, features, true}, rows, cols, features, false);
  siglip_epilogue(block, u, u_stride, level, pool);
  if (block->dz && block->dx)
    blas.multiply(block->dx, features, dz, {y, features}, rows, features, cols, block->dx_begun);
  if (block->dz && block->dy)
    blas.multiply(block->dy, features, {dz.data, dz.stride, true}, {x, features}, cols, features, rows,
                  block->dy_begun);
}

#if defined(__x86_64__)

namespace {

// A block task's largest tile, in L1; its part of y in L2.
constexpr int64_t kTileRows = 24, kTileColumns = 4 * avx512::kPanel;
constexpr int64_t kPackedAtOnce = 256;  // of y's features, by a task
// Panels of the right-hand matrix in a product's task.
constexpr int64_t kProductPanels = 3;
// Rows of a result up to which packing its operands costs more than it saves: of logits, as many as a row has words,
// and no more than these, unless the row is wide for the caches; of gradients, where float32 need not be packed.
constexpr int64_t kFewLogitRows = 1024, kWideRow = 8192, kFewRows = 128;

template <class Operand>
void block_of(const Block& block, const void* x_data, const void* y_data, int64_t features, uint32_t* packed,
              ParallelFor pool) {
  using namespace avx512;
  const auto* x = static_cast<const typename Operand::Element*>(x_data);
  const auto* y = static_cast<const typename Operand::Element*>(y_data);
  const int64_t wide = words<Operand>(features);
  const bool as_they_are = block.rows <= std::min(kFewLogitRows, wide) && wide <= kWideRow;
  // Work for every thread.
  const int64_t rows_each = as_they_are || block.rows * block.cols < 256 * 256 ? 6 : kTileRows;
  const int64_t panel_words = words<Operand>(features) * kPanel, row_tasks = ceil_div(block.rows, rows_each);
  const int64_t pieces = ceil_div(features, kPackedAtOnce);
  const int64_t packs = as_they_are ? 0 : panels(block.cols);
  for_each_task(pool, packs * pieces, packs * panel_words * kPackedWord, [&](int64_t task) {
    const int64_t p = task / pieces;
    const Range of_k = part(task % pieces, kPackedAtOnce, features);
    pack_transposed_panel<Operand>(y + of_k.begin, features, of_k.size(), part(p, kPanel, block.cols),
                                   packed + p * panel_words + words<Operand>(of_k.begin) * kPanel);
  });
  const int64_t tasks = row_tasks * ceil_div(block.cols, kTileColumns);
  const int64_t work = block.rows * block.cols * (words<Operand>(features) * kMultiplied + kPair);
  sum_tasks(pool, tasks, work, block, [&](int64_t task, double* sums) {
    alignas(64) float tile[kTileRows * kTileColumns];
    const Range rows = part(task % row_tasks, rows_each, block.rows);
    const Range cols = part(task / row_tasks, kTileColumns, block.cols);
    const auto* const left = x + rows.begin * features;
    if (as_they_are)
      multiply_rows<Operand>(left, y + cols.begin * features, features, tile, kTileColumns, rows.size(), cols.size());
    for (int64_t j = cols.begin; j < cols.end && !as_they_are; j += kPanel)
      multiply<Operand>(row_major(left, features), {packed + j / kPanel * panel_words}, features,
                        tile + (j - cols.begin), kTileColumns, rows.size(), std::min(kPanel, cols.end - j), false);
    epilogue(block, tile, kTileColumns, rows, cols, sums);
  });
}

template <class Operand>
void product_of(const Product& product, ParallelFor pool) {
  using namespace avx512;
  const int64_t m = product.m, n = product.n, k = product.k, panel_words = words<Operand>(k) * kPanel;
  const bool as_they_are = Operand::kInWord == 1 && n % kPanel == 0 && m <= kFewRows;
  const int64_t of_b = panels(n), of_a = product.transpose ? panels(m) : 0, packs = as_they_are ? 0 : of_b + of_a;
  const auto* a = static_cast<const typename Operand::Element*>(product.a);
  const auto* b = static_cast<const typename Operand::Element*>(product.b);
  uint32_t* const packed = product.packed;
  for_each_task(pool, packs, packs * panel_words * kPackedWord, [&](int64_t p) {
    if (p < of_b)
      pack_panel<Operand>(b, n, k, part(p, kPanel, n), packed + p * panel_words);
    else
      pack_panel<Operand>(a, product.a_stride, k, part(p - of_b, kPanel, m), packed + p * panel_words);
  });
  const int64_t groups = ceil_div(of_b, kProductPanels);
  for_each_task(pool, panels(m) * groups, m * n * words<Operand>(k) * kMultiplied, [&](int64_t task) {
    const int64_t row_panel = task / groups;
    const Range rows = part(row_panel, kPanel, m), group = part(task % groups, kProductPanels, of_b);
    const Right a_columns = as_they_are ? Right{a + rows.begin, product.a_stride}
                                        : Right{packed + (of_b + row_panel) * panel_words};
    const Left left = product.transpose ? transposed(a_columns)
                                        : row_major(a + rows.begin * product.a_stride, product.a_stride);
    for (int64_t p = group.begin; p < group.end; ++p) {
      const Range cols = part(p, kPanel, n);
      const Right right = as_they_are ? Right{b + cols.begin, n} : Right{packed + p * panel_words};
      multiply<Operand>(left, right, k, product.out + rows.begin * n + cols.begin, n, rows.size(),
                        cols.size(), product.accumulate);
    }
  });
}

}  // namespace

void siglip_block(const Block* block, const void* x, const void* y, int64_t features, uint32_t* packed,
                  ParallelFor pool) {
  const int64_t rows = block->rows, cols = block->cols, stride = block->dz_stride;
  const Dtype operand = block->operand;
  auto* const dx = static_cast<float*>(block->dx);
  auto* const dy = static_cast<float*>(block->dy);
  if (operand == Dtype::kBfloat16)
    block_of<avx512::Bfloat16>(*block, x, y, features, packed, pool);
  else
    block_of<avx512::Float32>(*block, x, y, features, packed, pool);
  if (block->dz && dx)
    multiply({dx, block->dz, stride, y, packed, rows, features, cols, operand, false, block->dx_begun}, pool);
  if (block->dz && dy)
    multiply({dy, block->dz, stride, x, packed, cols, features, rows, operand, true, block->dy_begun}, pool);
}

void multiply(const Product& product, ParallelFor pool) {
  if (product.operand == Dtype::kBfloat16)
    product_of<avx512::Bfloat16>(product, pool);
  else
    product_of<avx512::Float32>(product, pool);
}

#endif

void siglip_evaluate(int32_t level, Function function, Dtype dtype, const void* in, void* out, int64_t count) {
#if defined(__x86_64__)
  const Level best = usable(level);
  if (best >= Level::kAvx512) return avx512::evaluate(function, dtype, in, out, count);
  if (best == Level::kAvx2) return avx2::evaluate(function, dtype, in, out, count);
#endif
  (void)level;
  portable::evaluate(function, dtype, in, out, count);
}

}  // namespace siglip
