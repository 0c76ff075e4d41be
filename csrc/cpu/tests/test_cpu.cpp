// Tests every exported function against plain loops in float64, on heap arrays of the exact size and two threads of its
// own, so that the sanitizers see each access. Prints the first mismatch and returns 1.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "../cpu_info.h"
#include "../gemm.h"
#include "../interface.h"
#include "inputs.h"

namespace {

using namespace siglip;
using namespace siglip::tests;

int32_t two_threads(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  const int64_t middle = begin + (end - begin) / 2;
  std::thread other([=] { body(middle, end, context); });
  body(begin, middle, context);
  other.join();
  return 0;
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

void test_epilogue(const Case& c, int32_t level) {
  Inputs inputs(c);
  const auto u = uniform<float>(c.rows * c.cols, -1, 1);
  const Expected right = inputs.expected({u.begin(), u.end()});
  auto in_place = u;
  inputs.params.dz = in_place.data();
  inputs.params.dz_stride = c.cols;
  siglip_epilogue(&inputs.params, in_place.data(), c.cols, level, two_threads);
  inputs.expect(right, 1e-6, "sums of the epilogue in place");
  for (size_t i = 0; i < u.size(); ++i) expect_close(in_place[i], right.dz[i], 1e-5, "dz in place", i);

  // Rows have an odd stride, and no padding follows the last one.
  std::vector<uint16_t> dz((c.rows - 1) * (c.cols + 3) + c.cols);
  inputs.params.dz = dz.data();
  inputs.params.dz_stride = c.cols + 3;
  for (Dtype dtype : {Dtype::kFloat16, Dtype::kBfloat16}) {
    inputs.params.operand = dtype;
    siglip_epilogue(&inputs.params, u.data(), c.cols, level, two_threads);
    inputs.expect(right, 1e-6, "sums of the epilogue, half precision");
  }
  for (int64_t i = 0; i < c.rows * c.cols; ++i) {
    const double value = from_bf16(dz[i / c.cols * (c.cols + 3) + i % c.cols]);
    expect_close(value, right.dz[i], 0.005 * std::abs(right.dz[i]) + 1e-6, "dz in bfloat16", i);
  }

  inputs.params.dz = nullptr;
  for (int32_t loss_only : {0, 1}) {
    inputs.params.loss_only = loss_only;
    siglip_epilogue(&inputs.params, u.data(), c.cols, level, nullptr);
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
  inputs.params.scale = &scale;
  inputs.params.bias = &bias;
  if (inputs.params.image_weights) inputs.params.image_weights = inputs.params.text_weights = weights.data();
  if (inputs.params.image_masses) inputs.params.image_masses = inputs.params.text_masses = masses.data();
  inputs.params.logits = inputs.params.operand = Dtype::kFloat64;
  inputs.params.dz = dz.data();
  inputs.params.dz_stride = c.cols;
  siglip_epilogue(&inputs.params, dz.data(), c.cols, level, two_threads);
  inputs.expect(right, 1e-13, "sums in float64");
  for (size_t i = 0; i < u.size(); ++i) expect_close(dz[i], right.dz[i], 1e-13, "dz in float64", i);
}

void test_functions(int32_t level) {
  for (int64_t count : {1, 7, 64, 1001}) {
    const auto x = uniform<float>(count, -90, 0);
    std::vector<float> exp(count), log1p(count);
    siglip_evaluate(level, VectorFunction::kExp, Dtype::kFloat32, x.data(), exp.data(), count);
    siglip_evaluate(level, VectorFunction::kLog1p, Dtype::kFloat32, exp.data(), log1p.data(), count);
    for (int64_t i = 0; i < count; ++i) {
      expect_close(exp[i], std::exp(double(x[i])), 3e-7 * std::exp(double(x[i])) + 3e-45, "exp", i);
      expect_close(log1p[i], std::log1p(double(exp[i])), 3e-7 * exp[i] + 3e-45, "log1p", i);
    }
  }
}

// The operands' dtypes, with their conversions and the rounding of dz.
struct Bfloat16 : avx512::Bfloat16 {
  static constexpr Dtype kDtype = Dtype::kBfloat16;
  static constexpr double kRounding = 0.005;  // relative, of dz
  static uint16_t from(float value) { return to_bf16(value); }
  static double wide(uint16_t value) { return from_bf16(value); }
};
struct Float32 : avx512::Float32 {
  static constexpr Dtype kDtype = Dtype::kFloat32;
  static constexpr double kRounding = 0;
  static float from(float value) { return value; }
  static double wide(float value) { return value; }
};

template <class Element>
std::vector<typename Element::Storage> random_elements(int64_t count, double size) {
  std::vector<typename Element::Storage> values;
  for (float value : uniform<float>(count, -size, size)) values.push_back(Element::from(value));
  return values;
}

// A block and its gradients, computed by run(params, x, y).
template <class Element, class Run>
void test_block(const Case& c, int64_t features, Run&& run) {
  Inputs inputs(c);
  const auto x = random_elements<Element>(c.rows * features, 0.2), y = random_elements<Element>(c.cols * features, 0.2);
  std::vector<double> u(c.rows * c.cols);
  for (int64_t i = 0; i < c.rows; ++i)
    for (int64_t j = 0; j < c.cols; ++j)
      for (int64_t f = 0; f < features; ++f)
        u[i * c.cols + j] += Element::wide(x[i * features + f]) * Element::wide(y[j * features + f]);
  const Expected right = inputs.expected(u);
  std::vector<typename Element::Storage> dz(c.rows * c.cols);
  inputs.params.dz = dz.data();
  inputs.params.dz_stride = c.cols;
  inputs.params.operand = Element::kDtype;
  auto dx = uniform<float>(c.rows * features, -1, 1);
  const auto dx_before = dx;
  std::vector<float> dy(c.cols * features, NAN);
  inputs.params.dx = dx.data();
  inputs.params.dx_begun = true;
  inputs.params.dy = dy.data();
  run(inputs.params, x.data(), y.data());
  inputs.expect(right, 3e-6, "sums of a block");
  for (size_t i = 0; i < dz.size(); ++i)
    expect_close(Element::wide(dz[i]), right.dz[i], Element::kRounding * std::abs(right.dz[i]) + 1e-5, "dz", i);
  if (c.labels != Labels::kDiagonal) return;  // the gradients' GEMMs do not depend on labels
  const auto sum = [&](double begun, int64_t terms, auto&& term) {
    for (int64_t t = 0; t < terms; ++t) begun += term(t);
    return begun;
  };
  for (int64_t i = 0; i < c.rows; ++i)
    for (int64_t f = 0; f < features; ++f) {
      const int64_t at = i * features + f;
      const double expected = sum(dx_before[at], c.cols, [&](int64_t j) {
        return Element::wide(dz[i * c.cols + j]) * Element::wide(y[j * features + f]);
      });
      expect_close(dx[at], expected, 1e-6 * (double(c.cols) + 1), "dx", at);
    }
  for (int64_t j = 0; j < c.cols; ++j)
    for (int64_t f = 0; f < features; ++f) {
      const double expected = sum(0, c.rows, [&](int64_t i) {
        return Element::wide(dz[i * c.cols + j]) * Element::wide(x[i * features + f]);
      });
      expect_close(dy[j * features + f], expected, 1e-6 * (double(c.rows) + 1), "dy", j * features + f);
    }
}

// c = alpha·a·b + beta·c, column-major like a BLAS.
template <class Element>
void reference_gemm(bool trans_a, bool trans_b, int m, int n, int k, float alpha, const void* a, int lda, const void* b,
                    int ldb, float beta, void* c, int ldc) {
  const auto at = [](const void* matrix, int64_t ld, bool transpose, int row, int col) {
    const auto* elements = static_cast<const typename Element::Storage*>(matrix);
    return Element::wide(elements[transpose ? row * ld + col : col * ld + row]);
  };
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < m; ++i) {
      float& out = static_cast<float*>(c)[int64_t(j) * ldc + i];
      double sum = beta == 0 ? 0 : beta * out;  // c may hold NaN
      for (int p = 0; p < k; ++p) sum += alpha * at(a, lda, trans_a, i, p) * at(b, ldb, trans_b, p, j);
      out = float(sum);
    }
}

void sgemm(const char* trans_a, const char* trans_b, const int* m, const int* n, const int* k, const float* alpha,
           const void* a, const int* lda, const void* b, const int* ldb, const float* beta, void* c, const int* ldc) {
  reference_gemm<Float32>(*trans_a == 'T', *trans_b == 'T', *m, *n, *k, *alpha, a, *lda, b, *ldb, *beta, c, *ldc);
}

void gemm_bf16bf16f32(int layout, int trans_a, int trans_b, int m, int n, int k, float alpha, const void* a, int lda,
                      const void* b, int ldb, float beta, void* c, int ldc) {
  expect_close(layout, 102, 0, "layout", 0);
  reference_gemm<Bfloat16>(trans_a == 112, trans_b == 112, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void test_blas(const Case& c, int32_t level) {
  for (int64_t features : {1, 31}) {
    std::vector<float> u(c.rows * c.cols);
    test_block<Float32>(c, features, [&](const BlockParams& params, const float* x, const float* y) {
      const auto gemm = reinterpret_cast<BlasGemm>(sgemm);
      siglip_block_by_blas(&params, x, y, features, params.dz, params.dz_stride, gemm, level, two_threads);
    });
    test_block<Bfloat16>(c, features, [&](const BlockParams& params, const uint16_t* x, const uint16_t* y) {
      const auto gemm = reinterpret_cast<BlasGemm>(gemm_bf16bf16f32);
      siglip_block_by_blas(&params, x, y, features, u.data(), c.cols, gemm, level, two_threads);
    });
  }
}

#if defined(__x86_64__)

template <class Element>
int64_t packed_size(int64_t k, int64_t n) {
  return (k + Element::kElementsPerWord - 1) / Element::kElementsPerWord * avx512::num_panels(n) * avx512::kNR;
}

template <class Element>
void test_fused_block(const Case& c, int64_t features) {
  const int64_t dy_size = packed_size<Element>(c.rows, features) + packed_size<Element>(c.rows, c.cols);
  std::vector<uint32_t> packed(
      std::max({packed_size<Element>(features, c.cols), packed_size<Element>(c.cols, features), dy_size}));
  test_block<Element>(c, features, [&](const BlockParams& params, const auto* x, const auto* y) {
    siglip_block(&params, x, y, features, packed.data(), two_threads);
  });
}

template <class Element>
void test_gemm(int64_t m, int64_t n, int64_t k, bool transpose_a, bool accumulate) {
  const int64_t a_rows = transpose_a ? k : m, a_cols = transpose_a ? m : k, stride = a_cols + 5;
  const auto a = random_elements<Element>((a_rows - 1) * stride + a_cols, 1), b = random_elements<Element>(k * n, 1);
  auto out = uniform<float>(m * n, -1, 1);
  const auto before = out;
  std::vector<uint32_t> packed(packed_size<Element>(k, n) + (transpose_a ? packed_size<Element>(k, m) : 0));
  const GemmParams params{out.data(), a.data(), stride, b.data(), packed.data(), m, n, k, Element::kDtype, transpose_a,
                          accumulate};
  gemm(params, two_threads);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double right = accumulate ? before[i * n + j] : 0;
      for (int64_t p = 0; p < k; ++p)
        right += Element::wide(a[transpose_a ? p * stride + i : i * stride + p]) * Element::wide(b[p * n + j]);
      expect_close(out[i * n + j], right, 1e-6 * (double(k) + 1), "gemm", i * n + j);
    }
}

template <class Element>
void test_operand() {
  for (const Case& c : all_cases())
    for (int64_t features : {1, 31, 64, 1603}) test_fused_block<Element>(c, features);
  test_fused_block<Element>({330, 70, Labels::kDiagonal}, 301);  // enough rows to pack y, in two chunks of features
  for (bool transpose_a : {false, true})
    for (bool accumulate : {false, true})
      for (auto [m, n, k] : {std::array{1, 1, 1}, {13, 70, 31}, {65, 64, 1601}})
        test_gemm<Element>(m, n, k, transpose_a, accumulate);
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
  const int32_t highest = int32_t(detect_cpu().level);
  for (int32_t level = 0; level <= std::min(highest, int32_t(IsaLevel::kAvx512)); ++level) test_level(level);
#if defined(__x86_64__)
  if (highest >= int32_t(IsaLevel::kAvx512)) test_operand<Float32>();
  if (highest >= int32_t(IsaLevel::kAvx512Bf16)) test_operand<Bfloat16>();
#endif
  std::printf("ok up to level %d\n", highest);
}
