// wgmma.mma_async: descriptors decoded from their bits, and accumulators that are not there until they are waited for.
//
// A warpgroup's four warps are independent here: each issues, runs and waits for its own 16 rows. Until then a register
// holds a token, a signalling NaN that names the wgmma and the element: it survives moves, and arithmetic on it raises
// FE_INVALID. The wait replaces the tokens that it finds in the tracked registers.

#include <cmath>
#include <cstring>

#include "state.h"

namespace hopper {
namespace {

constexpr uint32_t kRows = 16, kK = 16, kMaxN = 256;
constexpr uint32_t kInfinity = 0x7f800000, kElementBits = 7, kMaxToken = (1u << 15) - 1;

// A row of an operand: two pieces of 8 features.
using Row = std::array<const uint8_t*, 2>;

// Where the rows of an operand are by its descriptor. The running warp reads them.
std::vector<Row> read_operand(uint64_t descriptor, uint32_t first_row, uint32_t rows) {
  constexpr uint32_t kSpans[] = {16, 128, 64, 32};  // of the swizzle, 16 without
  const auto bytes = [&](int bit) { return uint32_t(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t start = bytes(0), leading = bytes(16), stride = bytes(32), span = kSpans[descriptor >> 62];
  if (descriptor & 0x3ff0c000c000c000) fail("reserved bits of a descriptor");
  if ((start >> 7 & (span / 16 - 1)) != (descriptor >> 49 & 7)) fail("the swizzle's pattern begins elsewhere");
  std::vector<Row> result(rows);
  for (uint32_t i = 0; i < rows; ++i)
    for (uint32_t piece = 0; piece < 2; ++piece) {
      const uint32_t row = first_row + i, next = span == 16 ? leading : 16;
      const uint32_t at = swizzle(start + row / 8 * stride + row % 8 * span + piece * next, span);
      result[i][piece] = shared_bytes(at, 16, 16);
      cta->shadow.read(at, 16, warp().group(kWgmmaGroups), warp().known);
    }
  return result;
}

// A row's k-th feature.
float feature(Half type, const Row& row, uint32_t k) {
  uint16_t bits;
  std::memcpy(&bits, row[k / 8] + k % 8 * sizeof bits, sizeof bits);
  if (type == Half::kBfloat16) return __builtin_bit_cast(float, uint32_t(bits) << 16);
  const float magnitude = __builtin_bit_cast(float, (bits & 0x7fff) << 13) * 0x1p112f;  // from its bias to a float's
  const float value = magnitude < 0x1p16f ? magnitude : __builtin_bit_cast(float, kInfinity | bits << 13);
  return std::copysign(value, bits >> 15 ? -1.0f : 1.0f);
}

void multiply(Half type, const std::vector<Row>& a, const std::vector<Row>& b, Accumulators& to) {
  for (uint32_t k = 0; k < kK; ++k) {
    float features[kMaxN];
    for (uint32_t column = 0; column < to.n; ++column) features[column] = feature(type, b[column], k);
    for (uint32_t row = 0; row < kRows; ++row) {
      const float factor = feature(type, a[row], k);
      for (uint32_t column = 0; column < to.n; ++column) to.sums[row][column] += factor * features[column];
    }
  }
}

// The accumulators that a wgmma adds to: those in flight of which its registers hold the tokens, or the registers'
// numbers. From now on they hold the wgmma's tokens.
Accumulators& take_accumulators(uint32_t n, const Lanes& lanes) {
  std::list<Accumulators>& in_flight = warp().accumulators;
  const auto registers = [&](uint32_t lane) { return reinterpret_cast<uint32_t* const*>(lanes[lane][3]); };
  const auto is_taken = [&](const Accumulators& one) { return one.token == *registers(0)[0]; };
  auto taken = std::find_if(in_flight.begin(), in_flight.end(), is_taken);
  const bool are_numbers = taken == in_flight.end();
  if (are_numbers && !warp().wgmma_fenced) fail("no wgmma.fence since the accumulators were accessed");
  if (are_numbers) taken = in_flight.insert(taken, {n, 0, 0, {}});
  if (taken->n != n) fail("accumulators in flight of another shape");
  const uint32_t token = kInfinity | (warp().wgmma_count++ % kMaxToken + 1) << kElementBits;
  for (uint32_t lane = 0; lane < kWarpLanes; ++lane)
    for (uint32_t i = 0; i < n / 2; ++i) {
      uint32_t& bits = *registers(lane)[i];
      if (are_numbers)
        std::memcpy(&taken->at(lane, i), &bits, sizeof bits);
      else if (bits != (taken->token | i))
        fail("lane %u wrote accumulator %u while a wgmma was in flight", lane, i);
      bits = token | i;
    }
  taken->token = token;
  taken->group = warp().group(kWgmmaGroups).tick;
  return *taken;
}

// The accumulators are with the warp's threads again.
void hand_back(Accumulators& done) {
  for (uint32_t lane = 0; lane < kWarpLanes; ++lane) {
    bool found[kMaxN / 2]{};
    for (const auto& [registers, count] : warp().threads[lane].tracked)
      for (uint32_t r = 0; r < count; ++r) {
        const uint32_t i = registers[r] ^ done.token;
        if (i >= done.n / 2) continue;
        found[i] = true;
        std::memcpy(&registers[r], &done.at(lane, i), sizeof registers[r]);
      }
    for (uint32_t i = 0; i < done.n / 2; ++i)
      if (!found[i]) fail("lane %u wrote accumulator %u while a wgmma was in flight", lane, i);
  }
}

}  // namespace

void wgmma_fence() {
  converge("wgmma.fence", kEveryLane, true, {}, [](const Lanes&) { warp().wgmma_fenced = true; });
}

void wgmma_commit_group() {
  converge("wgmma.commit_group", kEveryLane, true, {}, [](const Lanes&) { ++warp().committed[kWgmmaGroups]; });
}

void wgmma_wait_group(uint32_t pending) {
  converge("wgmma.wait_group", kEveryLane, true, {}, [&](const Lanes&) {
    const uint32_t before = warp().tick(kWgmmaGroups);
    wait_groups(kWgmmaGroups, pending);
    const uint32_t done = warp().tick(kWgmmaGroups);
    if (done > before) warp().wgmma_fenced = false;
    warp().accumulators.remove_if([&](Accumulators& one) {
      if (one.group <= done) hand_back(one);
      return one.group <= done;
    });
  });
}

void wgmma(Half type, uint32_t n, uint32_t* const* accumulators, uint64_t a, uint64_t b, bool accumulate) {
  const Operands own = {a, b, accumulate, reinterpret_cast<uint64_t>(accumulators)};
  converge("wgmma.mma_async", kEveryLane, true, own, [&](const Lanes& lanes) {
    if (n % 8 || n < 8 || n > kMaxN) fail("n of %u", n);
    if (machine.threads % (kWarpgroupWarps * kWarpLanes)) fail("the CTA is not made of warpgroups");
    for (uint32_t lane = 0; lane < kWarpLanes; ++lane)
      if (!std::equal(own.begin(), own.begin() + 3, lanes[lane].begin())) fail("lane %u differs in its operands", lane);
    warp().wgmma_history = ((warp().wgmma_history ^ a) * 0x9e3779b97f4a7c15 ^ b) * 0x9e3779b97f4a7c15 + accumulate;
    const auto rows_of_a = read_operand(a, warp().index % kWarpgroupWarps * kRows, kRows);
    const auto rows_of_b = read_operand(b, 0, n);
    Accumulators& taken = take_accumulators(n, lanes);
    cta->in_flight.push_back({warp().group(kWgmmaGroups), [=, &taken] {
      if (!accumulate) std::memset(taken.sums, 0, sizeof taken.sums);
      multiply(type, rows_of_a, rows_of_b, taken);
    }});
  });
}

void track_registers(uint32_t* registers, uint32_t count) { self->tracked[registers] = count; }

}  // namespace hopper
