// What of the kernel needs no GPU: the arithmetic against float64, the order of tiles, the ring's phases, and where
// elements lie. Prints the first mismatch and returns 1.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "../epilogue.h"
#include "../fragment.h"
#include "../pipeline.h"
#include "../tiles.h"

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

// Before exp2 the rounding of |a|·log2(e) may cost |a| half units, that of log2(e) a quarter of it.
double bound(double a) { return (1.25 * std::min(std::abs(a), 200.0) + 8) * kUlp; }
// Below the smallest normal number e is 0.
constexpr double kFlushed = 0x1p-125;

enum class Path { kGeneral, kLow, kWeighted };

// One pair alone, as often as a chunk has room.
void test_pair(float a, Path path, float weight = 1) {
  constexpr int kCount = 16;
  float all[kCount], sigmoid[kCount], weights[kCount];
  std::fill(all, all + kCount, a);
  std::fill(weights, weights + kCount, weight);
  Sums sums;
  switch (path) {
    case Path::kGeneral: pairs<false, false>(all, sigmoid, sums); break;
    case Path::kLow: pairs<true, false>(all, sigmoid, sums); break;
    case Path::kWeighted: weighted_pairs<false>(all, weights, sigmoid, sums); break;
  }
  sums.flush();
  const double right = weight * exact_sigmoid(a), loss = kCount * weight * exact_softplus(a);
  EXPECT(std::abs(sigmoid[0] - right) <= bound(a) * right + weight * kFlushed, "sigmoid of %.9g: %.9g, expected %.9g", a,
         sigmoid[0], right);
  // A sum of kCount terms rounds kCount times.
  EXPECT(std::abs(sums.loss - loss) <= (bound(a) + kCount * kUlp) * loss + weight * kCount * kFlushed,
         "softplus of %.9g: %.9g, expected %.9g", a, sums.loss, loss);
}

void test_arithmetic() {
  for (int i = -120'000; i <= 120'000; ++i) test_pair(float(i) * 0.001f, Path::kGeneral);
  for (int i = -120'000; i < -4'000; ++i) test_pair(float(i) * 0.001f, Path::kLow);
  for (int i = -12'000; i <= 12'000; ++i) test_pair(float(i) * 0.01f, Path::kWeighted, 0.25f + float(i & 7));
  for (float a : {0.0f, -0.0f, 1e-30f, -1e-30f, 1e-45f}) test_pair(a, Path::kGeneral);
  for (Path path : {Path::kGeneral, Path::kLow, Path::kWeighted}) test_pair(-INFINITY, path);

  float a[2] = {INFINITY, -20}, sigmoid[2];
  Sums sums;
  pairs<false, false>(a, sigmoid, sums);
  sums.flush();
  EXPECT(sums.loss == INFINITY && sigmoid[0] == 1, "infinity: loss %g, sigmoid %g", sums.loss, sigmoid[0]);
  a[0] = NAN;
  EXPECT(!all_low(a), "NaN counts as low");
  sums = Sums();
  pairs<false, false>(a, sigmoid, sums);
  sums.flush();
  EXPECT(std::isnan(sums.loss) && std::isnan(sigmoid[0]), "NaN: loss %g, sigmoid %g", sums.loss, sigmoid[0]);
}

// What log(1 + e) would lose: kMostFactors pairs at a, and the largest product there can be.
void test_products() {
  for (float at : {-10.0f, -4.5f, -16.0f, 0.0f}) {
    float a[kMostFactors], sigmoid[kMostFactors];
    std::fill(a, a + kMostFactors, at);
    EXPECT(all_low(a) == (at < kUniformBelow), "all_low at %g", at);
    Sums sums;
    all_low(a) ? pairs<true, true>(a, sigmoid, sums) : pairs<false, true>(a, sigmoid, sums);
    sums.flush();
    const double right = kMostFactors * exact_softplus(at);
    EXPECT(std::abs(sums.loss - right) <= 3e-6 * right, "Σ softplus at %g: %.9g, expected %.9g", at, sums.loss, right);
  }
}

void test_tiles() {
  for (int rows : {1, 127, 128, 129, 1000, 1024, 1025, 2047, 5000})
    for (int cols : {1, 128, 300, 1100, 4097}) {
      const Tiles tiles(rows, cols);
      std::set<std::pair<int, int>> seen;
      for (int i = 0; i < tiles.count(); ++i) {
        const Tile tile = tiles.at(i);
        EXPECT(tile.m >= 0 && tile.m < rows && tile.m % kBlockM == 0, "tile %d of %d × %d: m = %d", i, rows, cols, tile.m);
        EXPECT(tile.n >= 0 && tile.n < cols && tile.n % kBlockN == 0, "tile %d of %d × %d: n = %d", i, rows, cols, tile.n);
        EXPECT(seen.insert({tile.m, tile.n}).second, "tile %d of %d × %d comes twice", i, rows, cols);
      }
      const size_t all = size_t((rows + kBlockM - 1) / kBlockM) * ((cols + kBlockN - 1) / kBlockN);
      EXPECT(seen.size() == all, "%zu tiles of %d × %d, expected %zu", seen.size(), rows, cols, all);
    }
}

// An mbarrier, as far as the ring uses it.
struct Barrier {
  int needed, arrived = 0;
  int64_t completed = 0;  // phases

  void arrive() {
    if (++arrived == needed) arrived = 0, ++completed;
  }
  bool passes(uint32_t parity) const { return (completed & 1) != int64_t(parity); }
};

// One multiprocessor of `programs`, its threads taking steps in random order. False where a consumer finds another
// tile's stage, a stage is filled while in use, or nobody can go on. For the test of this test: `skipped`, the steps that
// a consumer skips after its own, and whether consumers wait for their turn.
bool ring_works(int tiles, int programs, int program, int steps, int skipped, bool in_turn, std::mt19937& random) {
  struct Stage {
    int tile = -1, step = -1;
    bool in_use = false;
  };
  std::vector<Stage> stages(kStages);
  std::vector<Barrier> full(kStages, {1}), empty(kStages, {1}), turns(kConsumers, {1});
  struct Thread {
    int tile, step, own;
    Turn turn;
  };
  Thread producer{program, 0, 0, {}};
  std::vector<Thread> consumers;
  for (int c = 0; c < kConsumers; ++c) {
    consumers.push_back({program + c * programs, 0, 0, {}});
    consumers[c].turn.advance(c * steps);
  }
  std::vector<int> finished(tiles, 0);
  int idle = 0;
  while (producer.tile < tiles || std::any_of(consumers.begin(), consumers.end(), [&](auto& c) { return c.tile < tiles; })) {
    const int who = int(random() % (kConsumers + 1));
    bool moved = false;
    if (who == kConsumers && producer.tile < tiles && empty[producer.turn.stage].passes(producer.turn.before())) {
      Stage& stage = stages[producer.turn.stage];
      if (stage.in_use) return false;
      stage = {producer.tile, producer.step, true};
      full[producer.turn.stage].arrive();
      producer.turn.advance();
      if (++producer.step == steps) producer.step = 0, producer.tile += programs;
      moved = true;
    } else if (who < kConsumers && consumers[who].tile < tiles) {
      Thread& consumer = consumers[who];
      const bool its_turn = !in_turn || consumer.step > 0 || turns[who].passes(turn_parity(who, consumer.own));
      if (its_turn && full[consumer.turn.stage].passes(consumer.turn.parity)) {
        Stage& stage = stages[consumer.turn.stage];
        if (stage.tile != consumer.tile || stage.step != consumer.step || !stage.in_use) return false;
        stage.in_use = false;
        empty[consumer.turn.stage].arrive();
        consumer.turn.advance();
        if (++consumer.step == steps) {
          turns[next_consumer(who)].arrive();
          ++finished[consumer.tile];
          ++consumer.own;
          consumer.step = 0;
          consumer.tile += kConsumers * programs;
          consumer.turn.advance(skipped);
        }
        moved = true;
      }
    }
    idle = moved ? 0 : idle + 1;
    if (idle > 1000) return false;
  }
  for (int tile = program; tile < tiles; tile += programs)
    if (finished[tile] != 1) return false;
  return true;
}

void test_ring() {
  std::mt19937 random(0);
  for (int features : {1, 64, 65, 320, 384, 640, 768, 1024, 1152})
    for (int tiles : {1, 2, 3, 4, 5, 7, 12, 33})
      for (int programs : {1, 2, 3, 5}) {
        const int steps = stages_of(features);
        for (int program = 0; program < std::min(programs, tiles); ++program)
          EXPECT(ring_works(tiles, programs, program, steps, (kConsumers - 1) * steps, true, random),
                 "the ring fails with %d tiles, program %d of %d, %d steps", tiles, program, programs, steps);
      }
  // The test can fail: a consumer that forgets the other's stages, or skips one too many.
  EXPECT(!ring_works(7, 1, 0, 12, 0, true, random), "consumers that skip nothing pass");
  EXPECT(!ring_works(7, 1, 0, 12, 13, true, random), "consumers that skip 13 of 12 pass");
  EXPECT(!ring_works(7, 1, 0, 12, 12, false, random), "consumers that do not wait for their turn pass");
}

// Every element of a warp's 16 × 128 in one register of one lane; and, by way of stmatrix, in the place where the copy
// engine's 128-byte swizzle looks for it.
void test_fragments() {
  constexpr int kPieces = kStoredColumns / 8;
  std::vector<std::pair<int, int>> shared(16 * kStoredColumns, {-1, -1});
  std::set<std::pair<int, int>> seen;
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 64; ++i) seen.insert({fragment_row(lane, i), fragment_column(lane, i)});
  EXPECT(seen.size() == 16 * kBlockN && seen.rbegin()->first == 15, "%zu elements in the fragments", seen.size());

  // Four matrices at once: lane l holds row l / 4, columns l % 4 · 2 and one more of each.
  for (int piece = 0; piece < kPieces; piece += 2)
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int lane = 0; lane < 32; ++lane)
        for (int low = 0; low < 2; ++low) {
          const int i = piece * 4 + matrix * 2 + low, row = lane / 4;
          const int at = stored_at(8 * matrix + row, piece) / 2 + lane % 4 * 2 + low;
          shared[at] = {fragment_row(lane, i), fragment_column(lane, i)};
        }
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < kStoredColumns; ++column) {
      const int at = row * kStoredColumns + ((column / 8 ^ row % 8) * 8) + column % 8;
      EXPECT(shared[at] == std::pair(row, column), "shared memory has (%d, %d) for (%d, %d)", shared[at].first,
             shared[at].second, row, column);
    }
}

}  // namespace

int main() {
  test_arithmetic();
  test_products();
  test_tiles();
  test_ring();
  test_fragments();
  std::printf("ok\n");
}
