// The blocks of the C++ tests, with their dz, sums and stats by plain loops in float64.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <utility>
#include <vector>

#include "../params.h"

namespace siglip::tests {

inline std::mt19937 generator(0);

template <class T>
std::vector<T> uniform(int64_t count, double low, double high) {
  std::uniform_real_distribution<double> distribution(low, high);
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(distribution(generator));
  return values;
}

inline void expect_close(double value, double right, double tolerance, const char* what, int64_t where) {
  if (std::abs(value - right) <= tolerance) return;
  std::printf("%s: %.9g at %ld, expected %.9g\n", what, value, long(where), right);
  std::exit(1);
}

// The last four have a balance.
enum class Labels {
  kNone, kDiagonal, kIds, kWeights, kStats, kWeightsStats, kIgnore, kMasses, kSoftTargets,
  kBalance, kBalanceIgnore, kBalanceMasses, kBalanceSoftTargets
};

inline double softplus(double a) { return std::max(a, 0.0) + std::log1p(std::exp(-std::abs(a))); }
inline double sigmoid(double a) { return 1 / (1 + std::exp(-a)); }

// dz, sums and stats of a block, by their definitions.
struct Expected {
  std::vector<double> dz;
  double sums[kNumSums] = {}, stats[kNumStats] = {0, 0, 0, 0, INFINITY, INFINITY, -INFINITY, -INFINITY};

  Expected(const BlockParams& params, const std::vector<double>& u, double scale, double bias, const float* weights,
           const float* masses) {
    for (int64_t i = 0; i < params.rows; ++i)
      for (int64_t j = 0; j < params.cols; ++j) {
        const bool same = params.image_ids && params.image_ids[i] == params.text_ids[j];
        const bool positive = params.image_ids && !params.ignore_ids ? same : i + params.offset == j;
        const double z = scale * u[i * params.cols + j] + bias;
        const double mass = masses && positive ? double(masses[i]) + masses[j] : 1;
        const double label = positive ? params.soft_targets ? mass : 1 : 0;
        const double weight = (weights ? double(weights[i]) * weights[j] : 1) * (params.soft_targets ? 1 : mass);
        if (same && !positive) {
          dz.push_back(0);
          continue;
        }
        const double target = params.label_smoothing + (1 - 2 * params.label_smoothing) * label;
        const double weighted_target = params.positive_weight * target;
        dz.push_back(weight * ((1 - target) * sigmoid(z) - weighted_target * sigmoid(-z)));
        sums[0] += weight * ((1 - target) * softplus(z) + weighted_target * softplus(-z));
        sums[1] += dz.back() * u[i * params.cols + j];
        sums[2] += dz.back();
        if (weight == 0) continue;
        const int kind = positive ? 0 : 1;
        stats[kind] += z;
        stats[2 + kind] += 1;
        stats[4 + kind] = std::min(stats[4 + kind], z);
        stats[6 + kind] = std::max(stats[6 + kind], z);
      }
  }
};

struct Case {
  int64_t rows, cols;
  Labels labels;
};

inline std::vector<Case> all_cases() {
  std::vector<Case> cases;
  for (int labels = 0; labels <= int(Labels::kBalanceSoftTargets); ++labels)
    for (auto [rows, cols] : {std::pair{1, 1}, {3, 5}, {33, 65}, {70, 300}})
      cases.push_back({rows, cols, static_cast<Labels>(labels)});
  return cases;
}

// Parameters of a block with arrays of their own; the caller sets dz, its stride and the dtypes.
struct Inputs {
  float scale = 7, bias = -3;
  std::vector<int64_t> ids;
  std::vector<float> weights, masses;
  double sums[kNumSums], stats[kNumStats];
  BlockParams params{};

  explicit Inputs(const Case& c)
      : ids(std::max(c.rows, c.cols)),
        weights(uniform<float>(ids.size(), 0, 2)),
        masses(uniform<float>(ids.size(), 0.1, 0.5)) {
    weights[weights.size() / 2] = 0;
    const auto any_of = [&](auto... labels) { return ((c.labels == labels) || ...); };
    params.soft_targets = any_of(Labels::kSoftTargets, Labels::kBalanceSoftTargets);
    const bool has_masses = params.soft_targets || any_of(Labels::kMasses, Labels::kBalanceMasses);
    params.has_balance = c.labels >= Labels::kBalance;
    params.positive_weight = params.has_balance ? 2.5 : 1;
    params.label_smoothing = params.has_balance ? 0.125 : 0;
    const bool has_weights = has_masses || params.has_balance || any_of(Labels::kWeights, Labels::kWeightsStats);
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = int64_t(i % 5);
    params.rows = c.rows;
    params.cols = c.cols;
    params.scale = &scale;
    params.bias = &bias;
    params.offset = c.labels == Labels::kNone ? c.cols : 2;
    params.sums = sums;
    params.ignore_ids = any_of(Labels::kIgnore, Labels::kBalanceIgnore);
    if (c.labels == Labels::kIds || params.ignore_ids || has_masses) params.image_ids = params.text_ids = ids.data();
    if (has_weights) params.image_weights = params.text_weights = weights.data();
    if (has_masses) params.image_masses = params.text_masses = masses.data();
    if (c.labels >= Labels::kStats && !any_of(Labels::kMasses, Labels::kBalance)) params.stats = stats;
  }

  Expected expected(const std::vector<double>& u) const {
    return {params, u, scale, bias, params.image_weights ? weights.data() : nullptr,
            params.image_masses ? masses.data() : nullptr};
  }

  void expect(const Expected& right, double tolerance, const char* what) const {
    const double size = double(params.rows * params.cols);
    for (int s = 0; s < (params.loss_only ? 1 : 3); ++s)
      expect_close(sums[s], right.sums[s], tolerance * size, what, s);
    for (int s = 0; params.stats && s < kNumStats; ++s)
      if (stats[s] != right.stats[s]) expect_close(stats[s], right.stats[s], 10 * tolerance * size, what, kNumSums + s);
  }
};

}  // namespace siglip::tests
