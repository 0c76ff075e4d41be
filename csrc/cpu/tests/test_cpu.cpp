// Every exported function against plain loops in float64, on heap arrays of the exact size and two threads of its own,
// so that the sanitizers see each access. Prints the first mismatch and returns 1.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "../interface.h"
#include "../machine.h"
#include "../product.h"

namespace {

using namespace siglip;

int32_t two_threads(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  const int64_t middle = begin + (end - begin) / 2;
  std::thread other([=] { body(middle, end, context); });
  body(begin, middle, context);
  other.join();
  return 0;
}

std::mt19937 generator(0);

template <class T>
std::vector<T> uniform(int64_t count, double low, double high) {
  std::uniform_real_distribution<double> distribution(low, high);
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(distribution(generator));
  return values;
}

uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

double from_bf16(uint16_t value) {
  const uint32_t bits = uint32_t(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

void expect_close(double value, double right, double tolerance, const char* what, int64_t where) {
  if (std::abs(value - right) <= tolerance) return;
  std::printf("%s: %.9g at %ld, expected %.9g\n", what, value, long(where), right);
  std::exit(1);
}

enum class Labels { kNone, kDiagonal, kIds, kWeights, kStats, kWeightsStats, kIgnore, kMasses, kSoftTargets };

double softplus(double a) { return std::max(a, 0.0) + std::log1p(std::exp(-std::abs(a))); }
double sigmoid(double a) { return 1 / (1 + std::exp(-a)); }

// Dz, sums and stats of a block, defined.
struct Expected {
  std::vector<double> dz;
  double sums[kSums] = {}, stats[kStats] = {0, 0, 0, 0, INFINITY, INFINITY, -INFINITY, -INFINITY};

  Expected(const Block& block, const std::vector<double>& u, double scale, double bias, const float* weights,
           const float* masses) {
    for (int64_t i = 0; i < block.rows; ++i)
      for (int64_t j = 0; j < block.cols; ++j) {
        const bool same = block.image_ids && block.image_ids[i] == block.text_ids[j];
        const bool positive = block.image_ids && !block.ignore_ids ? same : i + block.offset == j;
        const double z = scale * u[i * block.cols + j] + bias, s = positive ? 1 : -1;
        const double weight = weights ? double(weights[i]) * weights[j] : 1;
        const double mass = masses && positive ? double(masses[i]) + masses[j] : 1;
        const double rest = block.soft_targets ? 1 - mass : 0;
        if (same && !positive) {
          dz.push_back(0);
          continue;
        }
        dz.push_back(-s * weight * (mass * sigmoid(-s * z) - rest * sigmoid(s * z)));
        sums[0] += weight * (mass * softplus(-s * z) + rest * softplus(s * z));
        sums[1] += dz.back() * u[i * block.cols + j];
        sums[2] += dz.back();
        if (weight == 0) continue;
        const int which = positive ? 0 : 1;
        stats[which] += z;
        stats[2 + which] += 1;
        stats[4 + which] = std::min(stats[4 + which], z);
        stats[6 + which] = std::max(stats[6 + which], z);
      }
  }
};

struct Case {
  int64_t rows, cols;
  Labels labels;
};

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  for (Labels labels : {Labels::kNone, Labels::kDiagonal, Labels::kIds, Labels::kWeights, Labels::kStats,
                        Labels::kWeightsStats, Labels::kIgnore, Labels::kMasses, Labels::kSoftTargets})
    for (auto [rows, cols] : {std::pair{1, 1}, {3, 5}, {33, 65}, {70, 300}}) cases.push_back({rows, cols, labels});
  return cases;
}

// A block description over `case_`'s own arrays; dz, stride and dtypes are the caller's to fill in.
struct Inputs {
  float scale = 7, bias = -3;
  std::vector<int64_t> ids;
  std::vector<float> weights, masses;
  double sums[kSums], stats[kStats];
  Block block{};

  explicit Inputs(const Case& c)
      : ids(std::max(c.rows, c.cols)),
        weights(uniform<float>(ids.size(), 0, 2)),
        masses(uniform<float>(ids.size(), 0.1, 0.5)) {
    weights[weights.size() / 2] = 0;
    const bool has_masses = c.labels == Labels::kMasses || c.labels == Labels::kSoftTargets;
    const bool has_weights = has_masses || c.labels == Labels::kWeights || c.labels == Labels::kWeightsStats;
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = int64_t(i % 5);
    block.rows = c.rows;
    block.cols = c.cols;
    block.scale = &scale;
    block.bias = &bias;
    block.offset = c.labels == Labels::kNone ? c.cols : 2;
    block.sums = sums;
    block.ignore_ids = c.labels == Labels::kIgnore;
    block.soft_targets = c.labels == Labels::kSoftTargets;
    if (c.labels == Labels::kIds || block.ignore_ids || has_masses) block.image_ids = block.text_ids = ids.data();
    if (has_weights) block.image_weights = block.text_weights = weights.data();
    if (has_masses) block.image_masses = block.text_masses = masses.data();
    if (c.labels != Labels::kMasses && c.labels >= Labels::kStats) block.stats = stats;
  }

  Expected expected(const std::vector<double>& u) const {
    return {block, u, scale, bias, block.image_weights ? weights.data() : nullptr,
            block.image_masses ? masses.data() : nullptr};
  }

  void expect(const Expected& right, double tolerance, const char* what) const {
    const double size = double(block.rows * block.cols);
    for (int s = 0; s < (block.loss_only ? 1 : 3); ++s)
      expect_close(sums[s], right.sums[s], tolerance * size, what, s);
    for (int s = 0; block.stats && s < kStats; ++s)
      if (stats[s] != right.stats[s]) expect_close(stats[s], right.stats[s], 10 * tolerance * size, what, kSums + s);
  }
};

void test_epilogue(const Case& c, int32_t level) {
  Inputs inputs(c);
  const auto u = uniform<float>(c.rows * c.cols, -1, 1);
  const Expected right = inputs.expected({u.begin(), u.end()});
  auto in_place = u;
  inputs.block.dz = in_place.data();
  inputs.block.dz_stride = c.cols;
  siglip_epilogue(&inputs.block, in_place.data(), c.cols, level, two_threads);
  inputs.expect(right, 1e-6, "sums of the epilogue in place");
  for (size_t i = 0; i < u.size(); ++i) expect_close(in_place[i], right.dz[i], 1e-5, "dz in place", i);

  // Rows padded to an odd stride; the last row ends with its last element.
  std::vector<uint16_t> dz((c.rows - 1) * (c.cols + 3) + c.cols);
  inputs.block.dz = dz.data();
  inputs.block.dz_stride = c.cols + 3;
  for (Dtype dtype : {Dtype::kFloat16, Dtype::kBfloat16}) {
    inputs.block.operand = dtype;
    siglip_epilogue(&inputs.block, u.data(), c.cols, level, two_threads);
    inputs.expect(right, 1e-6, "sums of the epilogue, half precision");
  }
  for (int64_t i = 0; i < c.rows * c.cols; ++i) {
    const double value = from_bf16(dz[i / c.cols * (c.cols + 3) + i % c.cols]);
    expect_close(value, right.dz[i], 0.005 * std::abs(right.dz[i]) + 1e-6, "dz in bfloat16", i);
  }

  inputs.block.dz = nullptr;
  for (int32_t loss_only : {0, 1}) {
    inputs.block.loss_only = loss_only;
    siglip_epilogue(&inputs.block, u.data(), c.cols, level, nullptr);
    inputs.expect(right, 1e-6, "sums without dz");
  }
}

void test_float64(const Case& c, int32_t level) {
  Inputs inputs(c);
  const double scale = inputs.scale, bias = inputs.bias;
  const auto u = uniform<double>(c.rows * c.cols, -1, 1);
  const std::vector<double> weights(inputs.weights.begin(), inputs.weights.end());
  const std::vector<double> masses(inputs.masses.begin(), inputs.masses.end());
  const Expected right = inputs.expected(u);
  auto dz = u;
  inputs.block.scale = &scale;
  inputs.block.bias = &bias;
  if (inputs.block.image_weights) inputs.block.image_weights = inputs.block.text_weights = weights.data();
  if (inputs.block.image_masses) inputs.block.image_masses = inputs.block.text_masses = masses.data();
  inputs.block.logits = inputs.block.operand = Dtype::kFloat64;
  inputs.block.dz = dz.data();
  inputs.block.dz_stride = c.cols;
  siglip_epilogue(&inputs.block, dz.data(), c.cols, level, two_threads);
  inputs.expect(right, 1e-13, "sums in float64");
  for (size_t i = 0; i < u.size(); ++i) expect_close(dz[i], right.dz[i], 1e-13, "dz in float64", i);
}

void test_functions(int32_t level) {
  for (int64_t count : {1, 7, 64, 1001}) {
    const auto x = uniform<float>(count, -90, 0);
    std::vector<float> exp(count), log1p(count);
    siglip_evaluate(level, Function::kExp, Dtype::kFloat32, x.data(), exp.data(), count);
    siglip_evaluate(level, Function::kLog1p, Dtype::kFloat32, exp.data(), log1p.data(), count);
    for (int64_t i = 0; i < count; ++i) {
      expect_close(exp[i], std::exp(double(x[i])), 3e-7 * std::exp(double(x[i])) + 3e-45, "exp", i);
      expect_close(log1p[i], std::log1p(double(exp[i])), 3e-7 * exp[i] + 3e-45, "log1p", i);
    }
  }
}

// An operand's elements and how exact results from them are.
struct Bfloat16 : avx512::Bfloat16 {
  static constexpr Dtype kDtype = Dtype::kBfloat16;
  static constexpr double kRounding = 0.005;  // of dz
  static uint16_t from(float value) { return to_bf16(value); }
  static double wide(uint16_t value) { return from_bf16(value); }
};
struct Float32 : avx512::Float32 {
  static constexpr Dtype kDtype = Dtype::kFloat32;
  static constexpr double kRounding = 0;
  static float from(float value) { return value; }
  static double wide(float value) { return value; }
};

template <class Operand>
std::vector<typename Operand::Element> operand(int64_t count, double size) {
  std::vector<typename Operand::Element> values;
  for (float value : uniform<float>(count, -size, size)) values.push_back(Operand::from(value));
  return values;
}

// A block and its gradients, which run(block, x, y) forms.
template <class Operand, class Run>
void test_block(const Case& c, int64_t features, Run&& run) {
  Inputs inputs(c);
  const auto x = operand<Operand>(c.rows * features, 0.2), y = operand<Operand>(c.cols * features, 0.2);
  std::vector<double> u(c.rows * c.cols);
  for (int64_t i = 0; i < c.rows; ++i)
    for (int64_t j = 0; j < c.cols; ++j)
      for (int64_t f = 0; f < features; ++f)
        u[i * c.cols + j] += Operand::wide(x[i * features + f]) * Operand::wide(y[j * features + f]);
  const Expected right = inputs.expected(u);
  std::vector<typename Operand::Element> dz(c.rows * c.cols);
  inputs.block.dz = dz.data();
  inputs.block.dz_stride = c.cols;
  inputs.block.operand = Operand::kDtype;
  auto dx = uniform<float>(c.rows * features, -1, 1);
  const auto dx_before = dx;
  std::vector<float> dy(c.cols * features, NAN);
  inputs.block.dx = dx.data();
  inputs.block.dx_begun = true;
  inputs.block.dy = dy.data();
  run(inputs.block, x.data(), y.data());
  inputs.expect(right, 3e-6, "sums of a block");
  for (size_t i = 0; i < dz.size(); ++i)
    expect_close(Operand::wide(dz[i]), right.dz[i], Operand::kRounding * std::abs(right.dz[i]) + 1e-5, "dz", i);
  if (c.labels != Labels::kDiagonal) return;  // the gradients' products do not ask for labels
  const auto sum = [&](double begun, int64_t terms, auto&& term) {
    for (int64_t t = 0; t < terms; ++t) begun += term(t);
    return begun;
  };
  for (int64_t i = 0; i < c.rows; ++i)
    for (int64_t f = 0; f < features; ++f) {
      const int64_t at = i * features + f;
      const double expected = sum(dx_before[at], c.cols, [&](int64_t j) {
        return Operand::wide(dz[i * c.cols + j]) * Operand::wide(y[j * features + f]);
      });
      expect_close(dx[at], expected, 1e-6 * (double(c.cols) + 1), "dx", at);
    }
  for (int64_t j = 0; j < c.cols; ++j)
    for (int64_t f = 0; f < features; ++f) {
      const double expected = sum(0, c.rows, [&](int64_t i) {
        return Operand::wide(dz[i * c.cols + j]) * Operand::wide(x[i * features + f]);
      });
      expect_close(dy[j * features + f], expected, 1e-6 * (double(c.rows) + 1), "dy", j * features + f);
    }
}

// c = alpha·a·b + beta·c, column by column, as a BLAS has it.
template <class Operand>
void plain_gemm(bool trans_a, bool trans_b, int m, int n, int k, float alpha, const void* a, int lda, const void* b,
                int ldb, float beta, void* c, int ldc) {
  const auto at = [](const void* matrix, int64_t ld, bool transpose, int row, int col) {
    const auto* elements = static_cast<const typename Operand::Element*>(matrix);
    return Operand::wide(elements[transpose ? row * ld + col : col * ld + row]);
  };
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < m; ++i) {
      float& out = static_cast<float*>(c)[int64_t(j) * ldc + i];
      double sum = beta == 0 ? 0 : beta * out;  // what is there may be NaN
      for (int p = 0; p < k; ++p) sum += alpha * at(a, lda, trans_a, i, p) * at(b, ldb, trans_b, p, j);
      out = float(sum);
    }
}

void sgemm(const char* trans_a, const char* trans_b, const int* m, const int* n, const int* k, const float* alpha,
           const void* a, const int* lda, const void* b, const int* ldb, const float* beta, void* c, const int* ldc) {
  plain_gemm<Float32>(*trans_a == 'T', *trans_b == 'T', *m, *n, *k, *alpha, a, *lda, b, *ldb, *beta, c, *ldc);
}

void gemm_bf16bf16f32(int layout, int trans_a, int trans_b, int m, int n, int k, float alpha, const void* a, int lda,
                      const void* b, int ldb, float beta, void* c, int ldc) {
  expect_close(layout, 102, 0, "layout", 0);
  plain_gemm<Bfloat16>(trans_a == 112, trans_b == 112, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void test_blas(const Case& c, int32_t level) {
  for (int64_t features : {1, 31}) {
    std::vector<float> u(c.rows * c.cols);
    test_block<Float32>(c, features, [&](const Block& block, const float* x, const float* y) {
      const auto gemm = reinterpret_cast<Gemm>(sgemm);
      siglip_block_by_blas(&block, x, y, features, block.dz, block.dz_stride, gemm, level, two_threads);
    });
    test_block<Bfloat16>(c, features, [&](const Block& block, const uint16_t* x, const uint16_t* y) {
      const auto gemm = reinterpret_cast<Gemm>(gemm_bf16bf16f32);
      siglip_block_by_blas(&block, x, y, features, u.data(), c.cols, gemm, level, two_threads);
    });
  }
}

#if defined(__x86_64__)

template <class Operand>
int64_t packed_words(int64_t k, int64_t n) {
  return (k + Operand::kInWord - 1) / Operand::kInWord * avx512::panels(n) * avx512::kPanel;
}

template <class Operand>
void test_own_block(const Case& c, int64_t features) {
  const int64_t for_dy = packed_words<Operand>(c.rows, features) + packed_words<Operand>(c.rows, c.cols);
  std::vector<uint32_t> packed(
      std::max({packed_words<Operand>(features, c.cols), packed_words<Operand>(c.cols, features), for_dy}));
  test_block<Operand>(c, features, [&](const Block& block, const auto* x, const auto* y) {
    siglip_block(&block, x, y, features, packed.data(), two_threads);
  });
}

template <class Operand>
void test_product(int64_t m, int64_t n, int64_t k, bool transpose, bool accumulate) {
  const int64_t a_rows = transpose ? k : m, a_cols = transpose ? m : k, stride = a_cols + 5;
  const auto a = operand<Operand>((a_rows - 1) * stride + a_cols, 1), b = operand<Operand>(k * n, 1);
  auto out = uniform<float>(m * n, -1, 1);
  const auto before = out;
  std::vector<uint32_t> packed(packed_words<Operand>(k, n) + (transpose ? packed_words<Operand>(k, m) : 0));
  const Product product{out.data(), a.data(), stride, b.data(), packed.data(), m, n, k, Operand::kDtype, transpose,
                        accumulate};
  multiply(product, two_threads);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double right = accumulate ? before[i * n + j] : 0;
      for (int64_t p = 0; p < k; ++p)
        right += Operand::wide(a[transpose ? p * stride + i : i * stride + p]) * Operand::wide(b[p * n + j]);
      expect_close(out[i * n + j], right, 1e-6 * (double(k) + 1), "product", i * n + j);
    }
}

template <class Operand>
void test_operand() {
  for (const Case& c : all_cases())
    for (int64_t features : {1, 31, 64, 1603}) test_own_block<Operand>(c, features);
  test_own_block<Operand>({330, 70, Labels::kDiagonal}, 301);  // rows enough to pack y, features for two pieces
  for (bool transpose : {false, true})
    for (bool accumulate : {false, true})
      for (auto [m, n, k] : {std::array{1, 1, 1}, {13, 70, 31}, {65, 64, 1601}})
        test_product<Operand>(m, n, k, transpose, accumulate);
}

#endif

void test_level(int32_t level) {
  test_functions(level);
  for (const Case& c : all_cases()) {
    test_epilogue(c, level);
    test_float64(c, level);
    test_blas(c, level);
  }
}

}  // namespace

int main() {
  const int32_t best = int32_t(this_machine().level);
  for (int32_t level = 0; level <= std::min(best, int32_t(Level::kAvx512)); ++level) test_level(level);
#if defined(__x86_64__)
  if (best >= int32_t(Level::kAvx512)) test_operand<Float32>();
  if (best >= int32_t(Level::kAvx512Bf16)) test_operand<Bfloat16>();
#endif
  std::printf("ok up to level %d\n", best);
}
