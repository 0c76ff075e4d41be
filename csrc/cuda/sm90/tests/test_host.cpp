// Tests what needs no GPU: the loss against float64, the tile scheduler, a simulation of the pipeline's barriers, the
// layouts. Prints the first mismatch and returns 1.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "../layout.h"
#include "../pipeline.h"
#include "../sigmoid_loss.h"
#include "../tile_scheduler.h"

namespace {

using namespace siglip::sm90;

constexpr double kUlp = 0x1p-24;

#define EXPECT(condition, ...)        \
  do {                                \
    if (!(condition)) {               \
      std::printf(__VA_ARGS__);       \
      std::printf(" (%s)\n", #condition); \
      std::exit(1);                   \
    }                                 \
  } while (0)

double exact_sigmoid(double a) { return a < 0 ? std::exp(a) / (1 + std::exp(a)) : 1 / (1 + std::exp(-a)); }
double exact_softplus(double a) { return std::max(a, 0.0) + std::log1p(std::exp(-std::abs(a))); }

// In the argument of exp2, rounding |a|·log2(e) costs up to |a| half ulps, and rounding log2(e) a quarter of that.
double bound(double a) { return (1.25 * std::min(std::abs(a), 200.0) + 8) * kUlp; }
// Below the smallest normal number e is flushed to 0.
constexpr double kFlushed = 0x1p-125;

enum class Path { kGeneral, kLow };

void expect_near(float value, double right, double relative, double absolute, const char* what, float a) {
  EXPECT(std::abs(value - right) <= relative * std::abs(right) + absolute, "%s of %.9g: %.9g, expected %.9g", what, a,
         value, right);
}

// Repeats one pair over a chunk.
void test_pair(float a, Path path) {
  constexpr int kCount = 16;
  float all[kCount], sigmoid[kCount];
  std::fill(all, all + kCount, a);
  Sums sums;
  path == Path::kLow ? accumulate_pairs<true, false>(all, sigmoid, sums)
                        : accumulate_pairs<false, false>(all, sigmoid, sums);
  sums.flush();
  expect_near(sigmoid[0], exact_sigmoid(a), bound(a), kFlushed, "sigmoid", a);
  // A sum of kCount terms rounds kCount times.
  expect_near(sums.loss, kCount * exact_softplus(a), bound(a) + kCount * kUlp, kCount * kFlushed, "softplus", a);
}

// With masses a term is a difference: the bound is on its parts.
void test_weighted_pair(float a, float weight, float mass, float opposite) {
  Sums sums;
  const float sigmoid = accumulate_weighted_pair<false>(a, weight, mass, opposite, sums);
  const double parts[] = {weight * mass * exact_sigmoid(a), weight * opposite * exact_sigmoid(-a)};
  const double loss = weight * (mass * exact_softplus(a) + opposite * exact_softplus(-a)), flushed = weight * kFlushed;
  expect_near(sigmoid, parts[0] - parts[1], 0, bound(a) * (parts[0] + parts[1]) + flushed, "sigmoid", a);
  expect_near(sums.loss, loss, bound(a), flushed, "softplus", a);
}

void test_arithmetic() {
  for (int i = -120'000; i <= 120'000; ++i) test_pair(float(i) * 0.001f, Path::kGeneral);
  for (int i = -120'000; i <= int(kLow * 1000); ++i) test_pair(float(i) * 0.001f, Path::kLow);
  for (int i = -12'000; i <= 12'000; ++i) {
    const float a = float(i) * 0.01f, weight = 0.25f + float(i & 7);
    test_weighted_pair(a, weight, 1, 0);
    test_weighted_pair(a, weight, 0.125f, 0);
    test_weighted_pair(a, weight, 0.125f, 0.875f);
  }
  for (float a : {0.0f, -0.0f, 1e-30f, -1e-30f, 1e-45f})
    for (Path path : {Path::kGeneral, Path::kLow}) test_pair(a, path);
  for (Path path : {Path::kGeneral, Path::kLow}) test_pair(-INFINITY, path);
  for (int i = 0; i <= 1'000'000; ++i) {
    const float e = float(i) * 1e-6f;
    expect_near(log1p_unit(e), std::log1p(double(e)), 1.4e-7, 0, "softplus", e);
  }

  float a[4] = {INFINITY, -20, -20, -20}, sigmoid[4];
  EXPECT(!all_low(a), "infinity is low");
  Sums sums;
  accumulate_pairs<false, false>(a, sigmoid, sums);
  sums.flush();
  EXPECT(sums.loss == INFINITY && sigmoid[0] == 1, "infinity: loss %g, sigmoid %g", sums.loss, sigmoid[0]);
  a[0] = NAN;
  for (Path path : {Path::kGeneral, Path::kLow}) {
    sums = Sums();
    path == Path::kLow ? accumulate_pairs<true, false>(a, sigmoid, sums)
                       : accumulate_pairs<false, false>(a, sigmoid, sums);
    sums.flush();
    EXPECT(std::isnan(sums.loss) && std::isnan(sigmoid[0]), "NaN: loss %g, sigmoid %g", sums.loss, sigmoid[0]);
  }
  for (int i = 0; i < 4; ++i) {
    float values[4] = {-20, -20, -20, -20};
    values[i] = std::nextafter(kLow, 3.0f);
    EXPECT(!all_low(values), "%.9g is low", values[i]);
    values[i] = kLow;
    EXPECT(all_low(values), "%.9g is not low", values[i]);
  }
  sums = Sums();
  sigmoid[0] = accumulate_weighted_pair<false>(NAN, 1, 1, 0, sums);
  EXPECT(std::isnan(sums.loss) && std::isnan(sigmoid[0]), "NaN: loss %g, sigmoid %g", sums.loss, sigmoid[0]);
}

// Sums that log(1 + e) in place of log1p would get wrong, and the largest product there can be.
void test_log1p_of_products() {
  for (float at : {-10.0f, -4.5f, -16.0f, 0.0f, kLow, 3.0f}) {
    float a[kMaxFactors], sigmoid[kMaxFactors];
    std::fill(a, a + kMaxFactors, at);
    EXPECT(all_low(a) == (at <= kLow), "all_low at %g", at);
    Sums sums;
    all_low(a) ? accumulate_pairs<true, true>(a, sigmoid, sums) : accumulate_pairs<false, true>(a, sigmoid, sums);
    sums.flush();
    const double right = kMaxFactors * exact_softplus(at);
    EXPECT(std::abs(sums.loss - right) <= 3e-6 * right, "Σ softplus at %g: %.9g, expected %.9g", at, sums.loss, right);
  }
}

void test_tile_scheduler() {
  for (int rows : {1, 127, 128, 129, 1000, 1024, 1025, 2047, 5000})
    for (int cols : {1, 128, 300, 1100, 4097}) {
      const TileScheduler scheduler(rows, cols);
      std::set<std::pair<int, int>> seen;
      for (int i = 0; i < scheduler.num_tiles(); ++i) {
        const TileCoord tile = scheduler.tile_coord(i);
        EXPECT(tile.m >= 0 && tile.m < rows && tile.m % kBlockM == 0, "tile %d of %d × %d: m = %d", i, rows, cols, tile.m);
        EXPECT(tile.n >= 0 && tile.n < cols && tile.n % kBlockN == 0, "tile %d of %d × %d: n = %d", i, rows, cols, tile.n);
        EXPECT(seen.insert({tile.m, tile.n}).second, "tile %d of %d × %d comes twice", i, rows, cols);
      }
      const size_t all = size_t((rows + kBlockM - 1) / kBlockM) * ((cols + kBlockN - 1) / kBlockN);
      EXPECT(seen.size() == all, "%zu tiles of %d × %d, expected %zu", seen.size(), rows, cols, all);
    }
}

// An mbarrier, as far as the pipeline uses it.
struct Mbarrier {
  int expected, arrived = 0;
  int64_t completed = 0;  // phases

  void arrive() {
    if (++arrived == expected) arrived = 0, ++completed;
  }
  bool passes(uint32_t parity) const { return (completed & 1) != int64_t(parity); }
};

// What a test breaks on purpose: the stages a consumer skips after its own tile, and its wait on the ordered barrier.
struct ConsumerRules {
  int skipped_stages;
  bool waits_for_order;
};

// One of `num_blocks` persistent thread blocks. Its producer and consumers take steps in random order; run() is false
// if a consumer finds another tile's stage, a stage is filled while it is in use, or nobody can go on.
class PipelineSimulation {
 public:
  PipelineSimulation(int num_tiles, int num_blocks, int block, int k_tiles, ConsumerRules rules)
      : num_tiles_(num_tiles), num_blocks_(num_blocks), k_tiles_(k_tiles), rules_(rules), producer_{block, 0, 0, {}} {
    for (int c = 0; c < kNumConsumers; ++c) {
      consumers_.push_back({block + c * num_blocks, 0, 0, {}});
      consumers_[c].state.advance(c * k_tiles);
    }
  }

  // Whether every tile of this block was computed once.
  bool run(std::mt19937& random) {
    const int first_tile = producer_.tile;
    for (int idle = 0; !done();) {
      const int who = int(random() % (kNumConsumers + 1));
      const bool moved = who == kNumConsumers ? step_producer() : step_consumer(who);
      idle = moved ? 0 : idle + 1;
      if (failed_ || idle > 1000) return false;
    }
    for (int tile = first_tile; tile < num_tiles_; tile += num_blocks_)
      if (computed_[tile] != 1) return false;
    return true;
  }

 private:
  struct Stage {
    int tile = -1, k_tile = -1;
    bool in_use = false;
  };
  struct Agent {
    int tile, k_tile, iteration;
    PipelineState state;
  };

  bool done() const {
    return producer_.tile >= num_tiles_ &&
           std::all_of(consumers_.begin(), consumers_.end(), [&](const Agent& c) { return c.tile >= num_tiles_; });
  }

  bool step_producer() {
    const int at = producer_.state.stage;
    if (producer_.tile >= num_tiles_ || !empty_barrier_[at].passes(producer_.state.producer_phase())) return false;
    failed_ |= stages_[at].in_use;
    stages_[at] = {producer_.tile, producer_.k_tile, true};
    full_barrier_[at].arrive();
    producer_.state.advance();
    if (++producer_.k_tile == k_tiles_) producer_.k_tile = 0, producer_.tile += num_blocks_;
    return true;
  }

  bool step_consumer(int who) {
    Agent& consumer = consumers_[who];
    const int at = consumer.state.stage;
    const bool in_order = !rules_.waits_for_order || consumer.k_tile > 0 ||
                          ordered_barrier_[who].passes(ordered_barrier_phase(who, consumer.iteration));
    if (consumer.tile >= num_tiles_ || !in_order || !full_barrier_[at].passes(consumer.state.phase)) return false;
    Stage& stage = stages_[at];
    failed_ |= stage.tile != consumer.tile || stage.k_tile != consumer.k_tile || !stage.in_use;
    stage.in_use = false;
    empty_barrier_[at].arrive();
    consumer.state.advance();
    if (++consumer.k_tile == k_tiles_) {
      ordered_barrier_[next_consumer(who)].arrive();
      ++computed_[consumer.tile];
      ++consumer.iteration;
      consumer.k_tile = 0;
      consumer.tile += kNumConsumers * num_blocks_;
      consumer.state.advance(rules_.skipped_stages);
    }
    return true;
  }

  int num_tiles_, num_blocks_, k_tiles_;
  ConsumerRules rules_;
  bool failed_ = false;
  std::vector<Stage> stages_ = std::vector<Stage>(kNumStages);
  std::vector<Mbarrier> full_barrier_ = std::vector<Mbarrier>(kNumStages, {1});
  std::vector<Mbarrier> empty_barrier_ = std::vector<Mbarrier>(kNumStages, {1});
  std::vector<Mbarrier> ordered_barrier_ = std::vector<Mbarrier>(kNumConsumers, {1});
  Agent producer_;
  std::vector<Agent> consumers_;
  std::vector<int> computed_ = std::vector<int>(num_tiles_);
};

void test_pipeline() {
  std::mt19937 random(0);
  for (int features : {1, 64, 65, 320, 384, 640, 768, 1024, 1152})
    for (int num_tiles : {1, 2, 3, 4, 5, 7, 12, 33})
      for (int num_blocks : {1, 2, 3, 5}) {
        const int k_tiles = num_k_tiles(features);
        const ConsumerRules rules{(kNumConsumers - 1) * k_tiles, true};
        for (int block = 0; block < std::min(num_blocks, num_tiles); ++block)
          EXPECT(PipelineSimulation(num_tiles, num_blocks, block, k_tiles, rules).run(random),
                 "the pipeline fails with %d tiles, block %d of %d, %d k-tiles", num_tiles, block, num_blocks, k_tiles);
      }
  // The simulation can fail: consumers that ignore the other's stages, skip one too many, or do not wait for the order.
  for (auto [skipped_stages, waits_for_order] : {std::pair{0, true}, {13, true}, {12, false}})
    EXPECT(!PipelineSimulation(7, 1, 0, 12, {skipped_stages, waits_for_order}).run(random),
           "consumers that skip %d of 12 stages pass, waiting for their order: %d", skipped_stages, waits_for_order);
}

// Every element of a warp's 16 × 128 is in one register of one lane, and stmatrix puts it where TMA's 128-byte swizzle
// reads it.
void test_layouts() {
  constexpr int kChunks = kStoreBoxColumns / 8;
  std::vector<std::pair<int, int>> shared(16 * kStoreBoxColumns, {-1, -1});
  std::set<std::pair<int, int>> seen;
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 64; ++i) seen.insert({accumulator_row(lane, i), accumulator_column(lane, i)});
  EXPECT(seen.size() == 16 * kBlockN && seen.rbegin()->first == 15, "%zu elements in the accumulator", seen.size());

  // Of each of stmatrix's four matrices, lane l holds row l / 4, columns l % 4 · 2 and the next.
  for (int chunk = 0; chunk < kChunks; chunk += 2)
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int lane = 0; lane < 32; ++lane)
        for (int low = 0; low < 2; ++low) {
          const int i = chunk * 4 + matrix * 2 + low, row = lane / 4;
          const int at = swizzled_offset(8 * matrix + row, chunk) / 2 + lane % 4 * 2 + low;
          shared[at] = {accumulator_row(lane, i), accumulator_column(lane, i)};
        }
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < kStoreBoxColumns; ++column) {
      const int at = row * kStoreBoxColumns + ((column / 8 ^ row % 8) * 8) + column % 8;
      EXPECT(shared[at] == std::pair(row, column), "shared memory has (%d, %d) for (%d, %d)", shared[at].first,
             shared[at].second, row, column);
    }
}

}  // namespace

int main() {
  test_arithmetic();
  test_log1p_of_products();
  test_tile_scheduler();
  test_pipeline();
  test_layouts();
  std::printf("ok\n");
}
