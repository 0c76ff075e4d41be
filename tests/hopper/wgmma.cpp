// wgmma.mma_async: descriptors decoded from their bits, and accumulators that are not there until they are waited for.
//
// A warpgroup's four warps are independent here: each issues, runs and waits for its own 16 rows. Until then a register
// holds a token, a signalling NaN that names the wgmma and the element: it survives moves, and arithmetic on it raises
// FE_INVALID. The wait replaces the tokens that it finds in the tracked registers.

#include <algorithm>
#include <cstring>

#include "state.h"

namespace hopper {
namespace {

constexpr uint32_t kRows = 16, kK = 16, kMaxN = 2 * kMaxAccumulators, kChunks = 2;  // of 16 bytes, in 16 features
constexpr uint32_t kTokenBits = 0x7f800000, kTokenMask = 0xffc00000, kElementBits = 7, kMaxToken = (1u << 15) - 1;

// 0: not a token.
uint32_t token_of(uint32_t bits) {
  return (bits & kTokenMask) == kTokenBits ? (bits & ~kTokenMask) >> kElementBits : 0;
}
uint32_t element_of(uint32_t bits) { return bits & ((1u << kElementBits) - 1); }

float widen(Half type, uint16_t bits) {
  uint32_t wide = uint32_t(bits) << 16;
  if (type == Half::kFloat16) {
    const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (!exponent) return (bits >> 15 ? -1.0f : 1.0f) * float(fraction) * 0x1p-24f;
    wide = (wide & 0x80000000) | (exponent == 31 ? 0xff : exponent + 112) << 23 | fraction << 13;
  }
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// An operand in shared memory by its descriptor.
struct Operand {
  uint32_t start, leading, stride, span;  // bytes; span: of the swizzle, 16 without

  explicit Operand(uint64_t descriptor) {
    const auto bytes = [&](int bit) { return uint32_t(descriptor >> bit & 0x3fff) << 4; };
    constexpr uint32_t kSpans[] = {16, 128, 64, 32};
    start = bytes(0);
    leading = bytes(16);
    stride = bytes(32);
    span = kSpans[descriptor >> 62];
    if (descriptor & 0x3ff0c000c000c000) fail("wgmma: reserved bits of a descriptor");
    if ((start >> 7 & (span / 16 - 1)) != (descriptor >> 49 & 7)) fail("wgmma: the swizzle's pattern begins elsewhere");
  }

  // Calls visit(row, number of the 16 bytes, shared address).
  template <class Visit>
  void for_each_chunk(uint32_t first_row, uint32_t rows, Visit visit) const {
    for (uint32_t row = first_row; row < first_row + rows; ++row)
      for (uint32_t chunk = 0; chunk < kChunks; ++chunk) {
        const uint32_t at = start + row / 8 * stride + row % 8 * span + chunk * (span == 16 ? leading : 16);
        visit(row, chunk, swizzle(at, span));
      }
  }
};

uint32_t first_row(const Warp& warp) { return warp.index % kWarpgroupWarps * kRows; }

// [kK][rows]: the rows from `first` on, transposed.
void load_rows(Half type, uint64_t descriptor, uint32_t first, uint32_t rows, float* values) {
  Operand(descriptor).for_each_chunk(first, rows, [&](uint32_t row, uint32_t chunk, uint32_t address) {
    uint16_t bits[8];
    std::memcpy(bits, cta->shared + address, sizeof bits);
    for (uint32_t i = 0; i < 8; ++i) values[(chunk * 8 + i) * rows + row - first] = widen(type, bits[i]);
  });
}

void multiply(const Warp& warp, Wgmma& wgmma) {
  const auto& [type, n, a_descriptor, b_descriptor, accumulate] = wgmma.shape;
  float a[kK * kRows], b[kK * kMaxN], sums[kRows][kMaxN]{};
  load_rows(type, a_descriptor, first_row(warp), kRows, a);
  load_rows(type, b_descriptor, 0, n, b);
  const auto copy_accumulator = [&, n = n](bool from_sums) {  // in the ISA's layout
    for (uint32_t lane = 0; lane < kWarpLanes; ++lane)
      for (uint32_t i = 0; i < n / 2; ++i) {
        void *sum = &sums[lane / 4 + (i & 2) * 4][i / 4 * 8 + lane % 4 * 2 + (i & 1)], *value = &wgmma.values[lane][i];
        std::memcpy(from_sums ? value : sum, from_sums ? sum : value, sizeof(float));
      }
  };
  if (accumulate) copy_accumulator(false);
  for (uint32_t k = 0; k < kK; ++k)
    for (uint32_t row = 0; row < kRows; ++row)
      for (uint32_t column = 0; column < n; ++column) sums[row][column] += a[k * kRows + row] * b[k * n + column];
  copy_accumulator(true);
  wgmma.executed = true;
}

// Later wgmmas that add to this one's result now have it.
void pass_on(Warp& warp, const Wgmma& done) {
  for (auto& other : warp.wgmmas)
    for (uint32_t lane = 0; lane < kWarpLanes && !other->executed; ++lane)
      for (uint32_t& bits : other->values[lane])
        if (token_of(bits) == done.token) bits = done.values[lane][element_of(bits)];
}

// The accumulator is with its threads again.
void retire(Warp& warp, Wgmma& wgmma) {
  for (uint32_t lane = 0; lane < kWarpLanes; ++lane) {
    for (const auto& [base, indices, count] : warp.threads[lane].tracked)
      for (uint32_t i = 0; i < count; ++i) {
        uint32_t& bits = base[indices[i]];
        if (token_of(bits) != wgmma.token) continue;
        wgmma.found[lane][element_of(bits)] = true;
        bits = wgmma.values[lane][element_of(bits)];
      }
    for (uint32_t i = 0; i < wgmma.shape.n / 2; ++i)
      if (!wgmma.found[lane][i]) fail("lane %u wrote accumulator %u while a wgmma was in flight", lane, i);
  }
}

// All warps of a warpgroup issue the same, in the same order.
void follow_warpgroup(const Warp& warp, const WgmmaShape& shape) {
  if (machine.threads % (kWarpgroupWarps * kWarpLanes)) fail("wgmma: the CTA is not made of warpgroups");
  auto& issued = cta->warpgroup_wgmmas[warp.index / kWarpgroupWarps];
  const uint64_t step = shape.a * 0x9e3779b97f4a7c15 ^ (shape.b + shape.accumulate);
  if (warp.wgmma_count == issued.size()) issued.push_back(step);
  if (issued[warp.wgmma_count] != step) fail("wgmma: the warps of a warpgroup differ");
}

void check_operands(Warp& warp, const WgmmaShape& shape) {
  const Access access = warp.access(Kind::kWgmmaGroups, warp.wgmma_committed + 1);
  const auto read = [&](uint32_t, uint32_t, uint32_t address) {
    shared_bytes(address, 16, 16, "wgmma");
    if (const char* problem = cta->shadow.read(address, 16, access)) fail("wgmma: %s", problem);
  };
  Operand(shape.a).for_each_chunk(first_row(warp), kRows, read);
  Operand(shape.b).for_each_chunk(0, shape.n, read);
}

// What a register adds to the product: a number, or a token of a wgmma in flight, which needs no fence.
void take_accumulator(Warp& warp, uint32_t lane, uint32_t i, uint32_t& bits, Wgmma& wgmma) {
  wgmma.values[lane][i] = bits;
  const uint32_t token = token_of(bits), element = element_of(bits);
  bits = kTokenBits | wgmma.token << kElementBits | i;
  for (auto& earlier : warp.wgmmas) {
    if (earlier->token != token) continue;
    if (earlier->shape.n != wgmma.shape.n) fail("wgmma: accumulators in flight of another shape");
    earlier->found[lane][element] = true;
    if (earlier->executed) wgmma.values[lane][i] = earlier->values[lane][element];
    return;
  }
  if (!warp.wgmma_fenced) fail("wgmma: no wgmma.fence since the accumulators were accessed");
}

struct Issue {
  WgmmaShape shape;
  Registers accumulators;
};

void issue(Warp& warp, const Lanes& lanes) {
  auto wgmma = std::make_unique<Wgmma>();
  wgmma->shape = static_cast<Issue*>(lanes[0])->shape;
  follow_warpgroup(warp, wgmma->shape);
  check_operands(warp, wgmma->shape);
  wgmma->token = warp.wgmma_count++ % kMaxToken + 1;
  wgmma->group = warp.wgmma_committed + 1;
  for (uint32_t lane = 0; lane < kWarpLanes; ++lane) {
    const auto& [shape, accumulators] = *static_cast<Issue*>(lanes[lane]);
    if (shape.a != wgmma->shape.a || shape.b != wgmma->shape.b || shape.accumulate != wgmma->shape.accumulate)
      fail("wgmma: lane %u differs in its operands", lane);
    for (uint32_t i = 0; i < accumulators.count; ++i)
      take_accumulator(warp, lane, i, accumulators.base[accumulators.indices[i]], *wgmma);
  }
  cta->in_flight.push_back({&warp, 0, true, [&warp, &wgmma = *wgmma] {
    multiply(warp, wgmma);
    pass_on(warp, wgmma);
  }});
  warp.wgmmas.push_back(std::move(wgmma));
}

void wait_for_groups(Warp& warp, const Lanes& lanes) {
  const uint32_t pending = *static_cast<uint32_t*>(lanes[0]);
  const uint32_t done = warp.wgmma_committed > pending ? warp.wgmma_committed - pending : 0;
  while (!warp.wgmmas.empty() && warp.wgmmas.front()->group <= done) {
    while (!warp.wgmmas.front()->executed)
      run_async([&](const Async& async) { return async.in_order && async.warp == &warp; });
    retire(warp, *warp.wgmmas.front());
    warp.wgmmas.pop_front();
    warp.wgmma_fenced = false;
  }
  warp.tick(Kind::kWgmmaGroups) = std::max(warp.tick(Kind::kWgmmaGroups), done);
}

}  // namespace

void wgmma_fence() {
  converge("wgmma.fence", kEveryLane, true, nullptr, [](Warp& warp, const Lanes&) { warp.wgmma_fenced = true; });
}

void wgmma_commit_group() {
  converge("wgmma.commit_group", kEveryLane, true, nullptr, [](Warp& warp, const Lanes&) { ++warp.wgmma_committed; });
}

void wgmma_wait_group(uint32_t pending) {
  converge("wgmma.wait_group", kEveryLane, true, &pending, wait_for_groups);
}

void wgmma(Half type, uint32_t n, uint32_t* registers, const uint16_t* accumulators, uint64_t a, uint64_t b,
           bool accumulate) {
  if (n % 8 || n < 8 || n > kMaxN) fail("wgmma: n of %u", n);
  const auto& tracked = self->tracked;
  const auto is_known = [&](const Registers& known) { return known.base == registers; };
  if (std::none_of(tracked.begin(), tracked.end(), is_known)) track_registers(registers, accumulators, n / 2);
  Issue arguments{{type, n, a, b, accumulate}, {registers, accumulators, n / 2}};
  converge("wgmma.mma_async", kEveryLane, true, &arguments, issue);
}

void track_registers(uint32_t* registers, const uint16_t* indices, uint32_t count) {
  self->tracked.push_back({registers, indices, count});
}

void check_warpgroups() {
  for (const auto& warp : cta->warps)
    if (warp->wgmma_count != cta->warpgroup_wgmmas[warp->index / kWarpgroupWarps].size())
      fail("wgmma: the warps of a warpgroup have issued different numbers");
}

}  // namespace hopper
