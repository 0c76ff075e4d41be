// Every exported function against plain loops in float64, on heap arrays of the exact size and several threads of its
// own, so that the sanitizers see each access. Prints the first mismatch and returns 1.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "../api.h"

#define SIGLIP_DECLARE(level)                                        \
  SIGLIP_API void siglip_epilogue_##level(const siglip::Block*);     \
  SIGLIP_API void siglip_exp_float_##level(const float*, float*, int64_t); \
  SIGLIP_API void siglip_log1p_float_##level(const float*, float*, int64_t);
SIGLIP_DECLARE(portable)
#if defined(__x86_64__)
SIGLIP_DECLARE(avx2)
SIGLIP_DECLARE(avx512)
SIGLIP_API void siglip_product_bf16(const siglip::Product*);
SIGLIP_API void siglip_block_bf16(const siglip::Block*, const siglip::Product*);
#endif
SIGLIP_API int64_t siglip_features();

namespace {

using namespace siglip;

int64_t threads = 3;

int32_t spawn(int64_t begin, int64_t end, int64_t, ParallelBody body, void* context) {
  std::vector<std::thread> pool;
  for (int64_t t = 0; t < threads; ++t) {
    const int64_t first = begin + (end - begin) * t / threads, last = begin + (end - begin) * (t + 1) / threads;
    if (first < last) pool.emplace_back([=] { body(first, last, context); });
  }
  for (std::thread& thread : pool) thread.join();
  return 0;
}

std::mt19937 generator(0);

template <class T>
std::vector<T> uniform(int64_t count, double low, double high) {
  std::uniform_real_distribution<double> distribution(low, high);
  std::vector<T> values(static_cast<size_t>(count));
  for (T& value : values) value = static_cast<T>(distribution(generator));
  return values;
}

uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

double wide(float value) { return value; }
double wide(double value) { return value; }
double wide(uint16_t value) {
  const uint32_t bits = uint32_t{value} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

void expect_close(double value, double right, double tolerance, const char* what, int64_t where) {
  if (std::abs(value - right) <= tolerance) return;
  std::printf("%s: %.9g at %lld, expected %.9g\n", what, value, static_cast<long long>(where), right);
  std::exit(1);
}

// A block of r × c pairs with its own arrays, and what should come out.
template <class T>
struct Case {
  int64_t r, c, labels;
  bool weighted;
  T scale = 7, bias = -3;
  std::vector<int64_t> image_ids, text_ids;
  std::vector<T> image_weights, text_weights;
  std::vector<double> dz;  // expected, as are the sums
  double right[3] = {}, sums[3];

  Case(int64_t r, int64_t c, int64_t labels, bool weighted) : r(r), c(c), labels(labels), weighted(weighted) {
    for (int64_t i = 0; i < r; ++i) image_ids.push_back(i % 5);
    for (int64_t j = 0; j < c; ++j) text_ids.push_back(j % 7);
    image_weights = uniform<T>(r, 0, 2);
    text_weights = uniform<T>(c, 0, 2);
  }

  template <class U>
  void define(const U& u) {
    for (int64_t i = 0; i < r; ++i) {
      for (int64_t j = 0; j < c; ++j) {
        const bool positive = labels == kIds ? image_ids[i] == text_ids[j] : labels == kOffset && i + 2 == j;
        const double s = positive ? 1 : -1, a = -s * (double(scale) * u[i * c + j] + double(bias));
        const double weight = weighted ? double(image_weights[i]) * double(text_weights[j]) : 1;
        dz.push_back(-s * weight / (1 + std::exp(-a)));
        right[0] += weight * (std::max(a, 0.0) + std::log1p(std::exp(-std::abs(a))));
        right[1] += dz.back() * u[i * c + j];
        right[2] += dz.back();
      }
    }
  }

  Block block(const T* u, int64_t ldu, void* out, int64_t lddz, Element element, bool loss_only) {
    return {r, c, u, ldu, out, lddz, element, &scale, &bias, labels, 2, image_ids.data(), text_ids.data(),
            weighted ? image_weights.data() : nullptr, weighted ? text_weights.data() : nullptr, loss_only, sums, spawn};
  }

  void expect_sums(double tolerance, bool loss_only, const char* what) const {
    for (int k = 0; k < (loss_only ? 1 : 3); ++k) {
      expect_close(sums[k], right[k], tolerance * double(r * c), what, k);
    }
  }
};

template <class T, class Out>
void test_epilogue(void (*epilogue)(const Block*), Case<T>& c, Element element, double tolerance, double rounding) {
  const auto u = uniform<T>(c.r * c.c, -1, 1);
  if (c.dz.empty()) {
    c.define(u);
  }
  Case<T> fresh = c;
  fresh.dz.clear();
  std::fill(fresh.right, fresh.right + 3, 0.0);
  fresh.define(u);
  // Rows apart by an odd stride; the last one ends with its last element.
  const int64_t stride = c.c + 3;
  std::vector<Out> dz(static_cast<size_t>(std::max<int64_t>(0, (c.r - 1) * stride + c.c)), Out(9));
  Block block = fresh.block(u.data(), c.c, dz.data(), stride, element, false);
  epilogue(&block);
  fresh.expect_sums(tolerance, false, "sums");
  for (int64_t i = 0; i < c.r * c.c; ++i) {
    const double right = fresh.dz[i];
    expect_close(wide(dz[i / c.c * stride + i % c.c]), right, rounding * std::abs(right) + tolerance, "dz", i);
  }
  for (int64_t i = 0; i + 1 < c.r; ++i) {
    for (int64_t j = c.c; j < stride; ++j) expect_close(wide(dz[i * stride + j]), wide(Out(9)), 0, "beside dz", j);
  }
  for (bool loss_only : {false, true}) {
    block = fresh.block(u.data(), c.c, nullptr, 0, element, loss_only);
    epilogue(&block);
    fresh.expect_sums(tolerance, loss_only, "sums without dz");
  }
  if constexpr (std::is_same_v<T, Out>) {
    auto in_place = u;
    block = fresh.block(in_place.data(), c.c, in_place.data(), c.c, element, false);
    epilogue(&block);
    fresh.expect_sums(tolerance, false, "sums in place");
    for (int64_t i = 0; i < c.r * c.c; ++i) expect_close(wide(in_place[i]), fresh.dz[i], tolerance, "dz in place", i);
  }
}

void test_level(void (*epilogue)(const Block*)) {
  for (int64_t labels : {kNone, kOffset, kIds}) {
    for (bool weighted : {false, true}) {
      for (auto [r, c] : {std::pair{1, 1}, {0, 5}, {5, 0}, {3, 15}, {33, 65}, {17, 1024}, {20, 1025}, {6, 2100}}) {
        Case<float> single(r, c, labels, weighted);
        test_epilogue<float, float>(epilogue, single, kFloat32, 1e-6, 0);
        test_epilogue<float, uint16_t>(epilogue, single, kBFloat16, 1e-6, 0.004);
        Case<double> twice(r, c, labels, weighted);
        test_epilogue<double, double>(epilogue, twice, kFloat64, 1e-13, 0);
      }
    }
  }
}

#if defined(__x86_64__)

std::vector<uint16_t> halves(int64_t count, double size) {
  std::vector<uint16_t> values;
  for (float value : uniform<float>(count, -size, size)) values.push_back(to_bf16(value));
  return values;
}

void test_product(int64_t m, int64_t n, int64_t k, bool a_turned, bool b_turned, bool accumulate) {
  const int64_t lda = (a_turned ? m : k) + 5, ldb = (b_turned ? k : n) + 3, ldo = n + 1;
  const auto a = halves((a_turned ? k - 1 : m - 1) * lda + (a_turned ? m : k), 1);
  const auto b = halves((b_turned ? n - 1 : k - 1) * ldb + (b_turned ? k : n), 1);
  auto out = uniform<float>((m - 1) * ldo + n, -1, 1);
  const auto before = out;
  const Product product{m, n, k, a.data(), a_turned ? 1 : lda, a_turned ? lda : 1, b.data(), b_turned ? 1 : ldb,
                        b_turned ? ldb : 1, out.data(), ldo, accumulate, spawn};
  siglip_product_bf16(&product);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double right = accumulate ? before[i * ldo + j] : 0;
      for (int64_t p = 0; p < k; ++p) {
        right += wide(a[i * product.a_row + p * product.a_col]) * wide(b[p * product.b_row + j * product.b_col]);
      }
      expect_close(out[i * ldo + j], right, 1e-6 * double(k + 1), "product", i * n + j);
    }
    if (i + 1 < m) expect_close(out[i * ldo + n], before[i * ldo + n], 0, "beside the product", i);
  }
}

void test_block(int64_t r, int64_t c, int64_t k, int64_t labels, bool weighted) {
  const auto x = halves(r * k, 0.2), y = halves(c * k, 0.2);
  std::vector<double> u(static_cast<size_t>(r * c));
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < c; ++j) {
      for (int64_t p = 0; p < k; ++p) u[i * c + j] += wide(x[i * k + p]) * wide(y[j * k + p]);
    }
  }
  Case<float> expected(r, c, labels, weighted);
  expected.define(u);
  std::vector<uint16_t> dz(static_cast<size_t>(r * c));
  const Product product{r, c, k, x.data(), k, 1, y.data(), 1, k, nullptr, 0, false, spawn};
  double first[3];
  for (int64_t count : {3, 1, 2, 7}) {  // the sums do not depend on the number of threads
    threads = count;
    const Block block = expected.block(nullptr, 0, dz.data(), c, kBFloat16, false);
    siglip_block_bf16(&block, &product);
    if (count == 3) std::memcpy(first, expected.sums, sizeof first);
    for (int s = 0; s < 3; ++s) expect_close(expected.sums[s], first[s], 0, "sums by threads", count);
  }
  threads = 3;
  expected.expect_sums(3e-6, false, "sums of a block");
  for (int64_t i = 0; i < r * c; ++i) {
    expect_close(wide(dz[i]), expected.dz[i], 0.004 * std::abs(expected.dz[i]) + 1e-5, "dz of a block", i);
  }
}

#endif

}  // namespace

int main() {
  test_level(siglip_epilogue_portable);
#if defined(__x86_64__)
  const int64_t features = siglip_features();
  if (features & kAvx2) test_level(siglip_epilogue_avx2);
  if (features & kAvx512) test_level(siglip_epilogue_avx512);
  if (features & kAvx512Bf16) {
    for (int turned = 0; turned < 8; ++turned) {
      const bool a = turned & 1, b = turned & 2, accumulate = turned & 4;
      test_product(1, 1, 1, a, b, accumulate);
      test_product(5, 63, 2, a, b, accumulate);
      test_product(13, 70, 31, a, b, accumulate);
      test_product(97, 129, 65, a, b, accumulate);
    }
    for (int64_t labels : {kNone, kOffset, kIds}) {
      for (bool weighted : {false, true}) {
        test_block(1, 1, 1, labels, weighted);
        test_block(100, 130, 33, labels, weighted);
        test_block(49, 1030, 48, labels, weighted);
      }
    }
  }
  std::printf("ok, features %lld\n", static_cast<long long>(features));
#else
  std::printf("ok, portable\n");
#endif
}
