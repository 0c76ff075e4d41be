#include "interface.h"

#include <algorithm>
#include <array>
#include <vector>

#include "gemm.h"

namespace siglip {
namespace {

using Epilogue = decltype(&portable::epilogue);

// Lowers `level` to what this CPU has: MKL's GEMMs for AMX run anywhere, the epilogue does not.
IsaLevel supported(int32_t level) {
  static const IsaLevel highest = detect_cpu().level;
  return std::min(static_cast<IsaLevel>(level), highest);
}

Epilogue select_epilogue(IsaLevel level) {
#if defined(__x86_64__)
  if (level >= IsaLevel::kAvx512) return avx512::epilogue;
  if (level == IsaLevel::kAvx2) return avx2::epilogue;
#endif
  (void)level;
  return portable::epilogue;
}

// Runs partial(task, sums) for every task and adds up the sums in task order, so that threads do not change the result.
template <int kSize, class Partial>
void reduce_tasks_of_size(ParallelFor pool, int64_t tasks, int64_t work, const BlockParams& params, Partial&& partial) {
  std::vector<std::array<double, kSize>> parts(tasks);
  for_each_task(pool, tasks, work, [&](int64_t task) { partial(task, parts[task].data()); });
  for (int s = 0; s < kNumSums; ++s) {
    params.sums[s] = 0;
    for (const auto& part : parts) params.sums[s] += part[s];
  }
  if constexpr (kSize > kNumSums)
    for (int s = 0; s < kNumStats; ++s) {
      double& total = params.stats[s] = parts[0][kNumSums + s];
      for (int64_t task = 1; task < tasks; ++task) {
        const double value = parts[task][kNumSums + s];
        total = s < 4 ? total + value : s < 6 ? std::min(total, value) : std::max(total, value);
      }
    }
}

template <class Partial>
void reduce_tasks(ParallelFor pool, int64_t tasks, int64_t work, const BlockParams& params, Partial&& partial) {
  params.stats ? reduce_tasks_of_size<kNumSums + kNumStats>(pool, tasks, work, params, partial)
               : reduce_tasks_of_size<kNumSums>(pool, tasks, work, params, partial);
}

// Estimated picoseconds on one thread: the epilogue of a pair, packing a word, multiplying two words.
constexpr int64_t kPairCost = 500, kPackWordCost = 200, kMultiplyWordCost = 20;

// A row-major matrix, or its transpose.
struct Matrix {
  const void* data;
  int stride;  // row stride in elements
  bool transpose;

  Matrix(const void* data, int64_t stride, bool transpose = false)
      : data(data), stride(int(std::max<int64_t>(stride, 1))), transpose(transpose) {}
};

struct Blas {
  BlasGemm gemm;
  Dtype operand;

  // out [m, n] = a·b, or += with `accumulate`. A column-major BLAS computes the transpose: outᵀ [n, m] = bᵀ·aᵀ.
  void run(void* out, int64_t out_stride, const Matrix& a, const Matrix& b, int64_t m, int64_t n, int64_t k,
           bool accumulate) const {
    const int sizes[] = {int(n), int(m), int(k)}, ldc = int(std::max<int64_t>(out_stride, 1));
    if (operand == Dtype::kFloat64) return run_fortran<double>(out, ldc, b, a, sizes, accumulate);
    if (operand == Dtype::kFloat32) return run_fortran<float>(out, ldc, b, a, sizes, accumulate);
    using CblasGemm =
        void (*)(int, int, int, int, int, int, float, const void*, int, const void*, int, float, void*, int);
    constexpr int kColumnMajor = 102, kNoTrans = 111, kTrans = 112;
    reinterpret_cast<CblasGemm>(gemm)(kColumnMajor, b.transpose ? kTrans : kNoTrans, a.transpose ? kTrans : kNoTrans,
                                      sizes[0], sizes[1], sizes[2], 1, b.data, b.stride, a.data, a.stride, accumulate,
                                      out, ldc);
  }

 private:
  template <class T>
  void run_fortran(void* c, int ldc, const Matrix& a, const Matrix& b, const int (&sizes)[3], T beta) const {
    using FortranGemm = void (*)(const char*, const char*, const int*, const int*, const int*, const T*, const void*,
                                 const int*, const void*, const int*, const T*, void*, const int*);
    const T alpha = 1;
    reinterpret_cast<FortranGemm>(gemm)(a.transpose ? "T" : "N", b.transpose ? "T" : "N", &sizes[0], &sizes[1],
                                        &sizes[2], &alpha, a.data, &a.stride, b.data, &b.stride, &beta, c, &ldc);
  }
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
Range chunk(int64_t index, int64_t size, int64_t end) { return {index * size, std::min(end, (index + 1) * size)}; }

}  // namespace

void siglip_machine(CpuInfo* info) { *info = detect_cpu(); }

void siglip_epilogue(const BlockParams* params, const void* u, int64_t u_stride, int32_t level, ParallelFor pool) {
  constexpr int64_t kPairsPerTask = 16384;
  const Epilogue epilogue = select_epilogue(supported(level));
  const int64_t rows = std::max<int64_t>(1, kPairsPerTask / std::max<int64_t>(1, params->cols));
  const int64_t item_size = params->logits == Dtype::kFloat64 ? 8 : 4;
  const int64_t work = params->rows * params->cols * kPairCost;
  reduce_tasks(pool, ceil_div(params->rows, rows), work, *params, [&](int64_t task, double* sums) {
    const Range range = chunk(task, rows, params->rows);
    epilogue(*params, static_cast<const char*>(u) + range.begin * u_stride * item_size, u_stride, range,
             {0, params->cols}, sums);
  });
}

void siglip_block_by_blas(const BlockParams* params, const void* x, const void* y, int64_t features, void* u,
                          int64_t u_stride, BlasGemm gemm, int32_t level, ParallelFor pool) {
  const int64_t rows = params->rows, cols = params->cols;
  const Blas blas{gemm, params->operand};
  const Matrix dz{params->dz, params->dz_stride};
  blas.run(u, u_stride, {x, features}, {y, features, true}, rows, cols, features, false);
  siglip_epilogue(params, u, u_stride, level, pool);
  if (params->dz && params->dx)
    blas.run(params->dx, features, dz, {y, features}, rows, features, cols, params->dx_begun);
  if (params->dz && params->dy)
    blas.run(params->dy, features, {dz.data, dz.stride, true}, {x, features}, cols, features, rows,
                  params->dy_begun);
}

void siglip_inner_products_by_blas(void* out, int64_t out_stride, const void* x, const void* y, int64_t rows,
                                   int64_t cols, int64_t features, int32_t operand, BlasGemm gemm) {
  Blas{gemm, Dtype(operand)}.run(out, out_stride, {x, features}, {y, features, true}, rows, cols, features, false);
}

#if defined(__x86_64__)

namespace {

// The largest tile of a task, which fits L1; its part of y fits L2.
constexpr int64_t kTileRows = 24;
static_assert(kTileColumns == 4 * avx512::kNR);
constexpr int64_t kPackChunkK = 256;  // features that one task packs
constexpr int64_t kPanelsPerGemmTask = 3;
// With few rows, packing costs more than it saves. Logits: no more rows than a row has words, nor than this limit, and
// no row too wide for the caches. Gradients: float32 only, because words of bfloat16 combine two rows.
constexpr int64_t kMaxUnpackedLogitRows = 1024, kMaxUnpackedWords = 8192, kMaxUnpackedGradRows = 128;

// x·yᵀ in tiles, one a task.
template <class Element>
class InnerProducts {
 public:
  InnerProducts(int64_t rows, int64_t cols, const void* x, const void* y, int64_t features, uint32_t* packed)
      : rows_(rows),
        cols_(cols),
        features_(features),
        x_(static_cast<const Storage*>(x)),
        y_(static_cast<const Storage*>(y)),
        packed_(packed),
        k_words_(avx512::num_k_words<Element>(features)),
        panel_words_(k_words_ * avx512::kNR),
        unpacked_(rows <= std::min(kMaxUnpackedLogitRows, k_words_) && k_words_ <= kMaxUnpackedWords),
        // Small blocks get small tiles, so that there are tasks for every thread.
        tile_rows_(unpacked_ || rows * cols < 256 * 256 ? 6 : kTileRows),
        row_tiles_(ceil_div(rows, tile_rows_)) {}

  int64_t tasks() const { return row_tiles_ * ceil_div(cols_, kTileColumns); }
  int64_t work() const { return rows_ * cols_ * (k_words_ * kMultiplyWordCost + kPairCost); }
  Range rows_of(int64_t task) const { return chunk(task % row_tiles_, tile_rows_, rows_); }
  Range cols_of(int64_t task) const { return chunk(task / row_tiles_, kTileColumns, cols_); }

  // Before the tasks.
  void pack(ParallelFor pool) const {
    const int64_t k_chunks = ceil_div(features_, kPackChunkK), panels = unpacked_ ? 0 : avx512::num_panels(cols_);
    for_each_task(pool, panels * k_chunks, panels * panel_words_ * kPackWordCost, [&](int64_t task) {
      const int64_t p = task / k_chunks;
      const Range k = chunk(task % k_chunks, kPackChunkK, features_);
      avx512::pack_transposed_panel<Element>(y_ + k.begin, features_, k.size(), chunk(p, avx512::kNR, cols_),
                                             packed_ + p * panel_words_ +
                                                 avx512::num_k_words<Element>(k.begin) * avx512::kNR);
    });
  }

  void compute(int64_t task, float* out, int64_t out_stride) const {
    using namespace avx512;
    const Range rows = rows_of(task), cols = cols_of(task);
    const Storage* const x = x_ + rows.begin * features_;
    if (unpacked_)
      gemm_nt<Element>(x, y_ + cols.begin * features_, features_, out, out_stride, rows.size(), cols.size());
    for (int64_t j = cols.begin; j < cols.end && !unpacked_; j += kNR)
      gemm_panel<Element>(row_major_a(x, features_), {packed_ + j / kNR * panel_words_}, features_,
                          out + (j - cols.begin), out_stride, rows.size(), std::min(kNR, cols.end - j), false);
  }

 private:
  using Storage = typename Element::Storage;
  const int64_t rows_, cols_, features_;
  const Storage* const x_;
  const Storage* const y_;
  uint32_t* const packed_;
  const int64_t k_words_, panel_words_;
  const bool unpacked_;
  const int64_t tile_rows_, row_tiles_;
};

// The GEMM of the logits with the epilogue on each tile, while it is in the cache.
template <class Element>
void fused_gemm_epilogue(const BlockParams& params, const void* x, const void* y, int64_t features, uint32_t* packed,
                         ParallelFor pool) {
  const InnerProducts<Element> products(params.rows, params.cols, x, y, features, packed);
  products.pack(pool);
  reduce_tasks(pool, products.tasks(), products.work(), params, [&](int64_t task, double* sums) {
    alignas(64) float tile[kTileRows * kTileColumns];
    products.compute(task, tile, kTileColumns);
    avx512::epilogue(params, tile, kTileColumns, products.rows_of(task), products.cols_of(task), sums);
  });
}

template <class Element>
void inner_products(float* out, int64_t out_stride, const void* x, const void* y, int64_t rows, int64_t cols,
                    int64_t features, uint32_t* packed, ParallelFor pool) {
  const InnerProducts<Element> products(rows, cols, x, y, features, packed);
  products.pack(pool);
  for_each_task(pool, products.tasks(), products.work(), [&](int64_t task) {
    products.compute(task, out + products.rows_of(task).begin * out_stride + products.cols_of(task).begin, out_stride);
  });
}

template <class Element>
void parallel_gemm(const GemmParams& params, ParallelFor pool) {
  using namespace avx512;
  const int64_t m = params.m, n = params.n, k = params.k, panel_words = num_k_words<Element>(k) * kNR;
  const bool unpacked = Element::kElementsPerWord == 1 && n % kNR == 0 && m <= kMaxUnpackedGradRows;
  const int64_t b_panels = num_panels(n), a_panels = params.transpose_a ? num_panels(m) : 0;
  const int64_t panels = unpacked ? 0 : b_panels + a_panels;
  const auto* a = static_cast<const typename Element::Storage*>(params.a);
  const auto* b = static_cast<const typename Element::Storage*>(params.b);
  uint32_t* const packed = params.packed;
  for_each_task(pool, panels, panels * panel_words * kPackWordCost, [&](int64_t p) {
    if (p < b_panels)
      pack_panel<Element>(b, n, k, chunk(p, kNR, n), packed + p * panel_words);
    else
      pack_panel<Element>(a, params.a_stride, k, chunk(p - b_panels, kNR, m), packed + p * panel_words);
  });
  const int64_t groups = ceil_div(b_panels, kPanelsPerGemmTask);
  for_each_task(pool, num_panels(m) * groups, m * n * num_k_words<Element>(k) * kMultiplyWordCost, [&](int64_t task) {
    const int64_t row_panel = task / groups;
    const Range rows = chunk(row_panel, kNR, m), group = chunk(task % groups, kPanelsPerGemmTask, b_panels);
    const OperandB a_columns = unpacked ? OperandB{a + rows.begin, params.a_stride}
                                        : OperandB{packed + (b_panels + row_panel) * panel_words};
    const OperandA a_rows = params.transpose_a ? transposed_panel_a(a_columns)
                                               : row_major_a(a + rows.begin * params.a_stride, params.a_stride);
    for (int64_t p = group.begin; p < group.end; ++p) {
      const Range cols = chunk(p, kNR, n);
      const OperandB b_columns = unpacked ? OperandB{b + cols.begin, n} : OperandB{packed + p * panel_words};
      gemm_panel<Element>(a_rows, b_columns, k, params.out + rows.begin * n + cols.begin, n, rows.size(), cols.size(),
                          params.accumulate);
    }
  });
}

}  // namespace

void siglip_block(const BlockParams* params, const void* x, const void* y, int64_t features, uint32_t* packed,
                  ParallelFor pool) {
  const int64_t rows = params->rows, cols = params->cols, stride = params->dz_stride;
  const Dtype operand = params->operand;
  auto* const dx = static_cast<float*>(params->dx);
  auto* const dy = static_cast<float*>(params->dy);
  if (operand == Dtype::kBfloat16)
    fused_gemm_epilogue<avx512::Bfloat16>(*params, x, y, features, packed, pool);
  else
    fused_gemm_epilogue<avx512::Float32>(*params, x, y, features, packed, pool);
  if (params->dz && dx)
    gemm({dx, params->dz, stride, y, packed, rows, features, cols, operand, false, params->dx_begun}, pool);
  if (params->dz && dy)
    gemm({dy, params->dz, stride, x, packed, cols, features, rows, operand, true, params->dy_begun}, pool);
}

void siglip_inner_products(float* out, int64_t out_stride, const void* x, const void* y, int64_t rows, int64_t cols,
                           int64_t features, int32_t operand, uint32_t* packed, ParallelFor pool) {
  const auto run = Dtype(operand) == Dtype::kBfloat16 ? inner_products<avx512::Bfloat16>
                                                      : inner_products<avx512::Float32>;
  run(out, out_stride, x, y, rows, cols, features, packed, pool);
}

void gemm(const GemmParams& params, ParallelFor pool) {
  if (params.operand == Dtype::kBfloat16)
    parallel_gemm<avx512::Bfloat16>(params, pool);
  else
    parallel_gemm<avx512::Float32>(params, pool);
}

#endif

void siglip_evaluate(int32_t level, VectorFunction function, Dtype dtype, const void* in, void* out, int64_t count) {
#if defined(__x86_64__)
  const IsaLevel supported_level = supported(level);
  if (supported_level >= IsaLevel::kAvx512) return avx512::evaluate(function, dtype, in, out, count);
  if (supported_level == IsaLevel::kAvx2) return avx2::evaluate(function, dtype, in, out, count);
#endif
  (void)level;
  portable::evaluate(function, dtype, in, out, count);
}

}  // namespace siglip
