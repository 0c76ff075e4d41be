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

constexpr uint32_t kRows = 16, kK = 16, kMaxN = 2 * kMaxAccumulators, kElementBytes = 2;
constexpr uint32_t kTokenBits = 0x7f800000, kTokenMask = 0xffc00000, kElementBits = 7, kMaxToken = (1u << 15) - 1;

bool is_token(uint32_t bits) { return (bits & kTokenMask) == kTokenBits && bits != kTokenBits; }
uint32_t token_bits(uint32_t token, uint32_t element) { return kTokenBits | token << kElementBits | element; }
uint32_t token_of(uint32_t bits) { return (bits & ~kTokenMask) >> kElementBits; }
uint32_t element_of(uint32_t bits) { return bits & ((1u << kElementBits) - 1); }

Wgmma* find(Warp& warp, uint32_t token) {
  for (auto& wgmma : warp.wgmmas)
    if (wgmma->token == token) return wgmma.get();
  return nullptr;
}

float widen(Half type, uint16_t bits) {
  if (type == Half::kBfloat16) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
  const uint32_t sign = uint32_t(bits >> 15) << 31, exponent = bits >> 10 & 31, fraction = bits & 1023;
  float value;
  if (exponent == 0) {
    value = float(fraction) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t wide = sign | (exponent == 31 ? 0xff : exponent + 112) << 23 | fraction << 13;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// An operand in shared memory by its 64-bit descriptor.
struct Operand {
  uint32_t start, leading, stride, span;  // bytes; span: of the swizzle, 16 without

  explicit Operand(uint64_t descriptor)
      : start((descriptor & 0x3fff) << 4), leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4), span(16) {
    constexpr uint32_t kSpans[] = {16, 128, 64, 32};
    span = kSpans[descriptor >> 62];
    const uint32_t base_offset = descriptor >> 49 & 7;
    if (descriptor & 0x1ff0c000c000c000) fail("wgmma: a descriptor of %lx", static_cast<unsigned long>(descriptor));
    if ((start >> 7 & (span / 16 - 1)) != base_offset) fail("wgmma: the swizzle's pattern begins elsewhere");
  }

  // Shared address of 8 features, 16 bytes, of a row.
  uint32_t at(uint32_t row, uint32_t chunk) const {
    if (span == 16) return start + row / 8 * stride + row % 8 * 16 + chunk * leading;
    return swizzle(start + row / 8 * stride + row % 8 * span + chunk * 16, span);
  }

  template <class Visit>
  void for_each_chunk(uint32_t first_row, uint32_t rows, Visit visit) const {
    for (uint32_t row = first_row; row < first_row + rows; ++row)
      for (uint32_t chunk = 0; chunk < kK * kElementBytes / 16; ++chunk) visit(row, chunk, at(row, chunk));
  }
};

uint32_t first_row(const Warp& warp) { return warp.index % kWarpgroupWarps * kRows; }

// [kK][rows]: the rows from `first` on, transposed.
void load_rows(const Warp& warp, Half type, uint64_t descriptor, uint32_t first, uint32_t rows, float* values) {
  Operand(descriptor).for_each_chunk(first, rows, [&](uint32_t row, uint32_t chunk, uint32_t address) {
    uint16_t bits[8];
    std::memcpy(bits, warp.cta->shared + address, sizeof bits);
    for (uint32_t i = 0; i < 8; ++i) values[(chunk * 8 + i) * rows + row - first] = widen(type, bits[i]);
  });
}

void run(Warp& warp, Wgmma& wgmma) {
  float a[kK * kRows], b[kK * kMaxN], sums[kRows][kMaxN]{};
  const auto for_each_element = [&](auto visit) {  // in the ISA's layout of the accumulator
    for (uint32_t lane = 0; lane < kWarpLanes; ++lane)
      for (uint32_t i = 0; i < wgmma.n / 2; ++i)
        visit(wgmma.values[lane][i], sums[lane / 4 + (i & 2) * 4][i / 4 * 8 + lane % 4 * 2 + (i & 1)]);
  };
  load_rows(warp, wgmma.type, wgmma.a, first_row(warp), kRows, a);
  load_rows(warp, wgmma.type, wgmma.b, 0, wgmma.n, b);
  if (wgmma.accumulate) for_each_element([](uint32_t& bits, float& sum) { std::memcpy(&sum, &bits, sizeof sum); });
  for (uint32_t k = 0; k < kK; ++k)
    for (uint32_t row = 0; row < kRows; ++row)
      for (uint32_t column = 0; column < wgmma.n; ++column) sums[row][column] += a[k * kRows + row] * b[k * wgmma.n + column];
  for_each_element([](uint32_t& bits, float& sum) { std::memcpy(&bits, &sum, sizeof sum); });
  wgmma.executed = true;
}

// A later wgmma that adds to this one's result now has it.
void pass_on(Warp& warp, const Wgmma& done) {
  for (auto& other : warp.wgmmas)
    if (!other->executed && other->accumulate)
      for (uint32_t lane = 0; lane < kWarpLanes; ++lane)
        for (uint32_t i = 0; i < other->n / 2; ++i) {
          uint32_t& bits = other->values[lane][i];
          if (is_token(bits) && token_of(bits) == done.token) bits = done.values[lane][element_of(bits)];
        }
}

// The accumulator is with its threads again.
void retire(Warp& warp, Wgmma& wgmma) {
  for (uint32_t lane = 0; lane < kWarpLanes; ++lane) {
    for (const Registers& registers : warp.threads[lane].tracked)
      for (uint32_t i = 0; i < registers.count; ++i) {
        uint32_t& bits = registers.base[registers.indices[i]];
        if (!is_token(bits) || token_of(bits) != wgmma.token) continue;
        wgmma.found[lane][element_of(bits)] = true;
        bits = wgmma.values[lane][element_of(bits)];
      }
    for (uint32_t i = 0; i < wgmma.n / 2; ++i)
      if (!wgmma.found[lane][i]) fail("lane %u wrote accumulator %u while a wgmma was in flight", lane, i);
  }
}

// All warps of a warpgroup issue the same, in the same order.
void follow_warpgroup(Warp& warp, uint64_t a, uint64_t b) {
  if (machine.threads % (kWarpgroupWarps * kWarpLanes)) fail("wgmma: the CTA is not made of warpgroups");
  auto& steps = warp.cta->warpgroup_steps[warp.index / kWarpgroupWarps];
  const uint64_t step = a * 0x9e3779b97f4a7c15 ^ b;
  if (warp.warpgroup_step == steps.size()) steps.push_back(step);
  if (steps[warp.warpgroup_step++] != step) fail("wgmma: the warps of a warpgroup differ");
}

struct Issue {
  Half type;
  uint32_t n;
  uint32_t* registers;
  const uint16_t* accumulators;
  uint64_t a, b;
  bool accumulate;

  bool operator==(const Issue& other) const {
    return type == other.type && n == other.n && a == other.a && b == other.b && accumulate == other.accumulate;
  }
};

void check_operands(Warp& warp, const Issue& issue) {
  const Access access{warp.knowledge, warp.actor(Kind::kWgmmaGroups), warp.wgmma_committed + 1, true};
  const auto read = [&](uint32_t, uint32_t, uint32_t address) {
    shared_bytes(*warp.cta, address, 16, 16, "wgmma");
    if (const char* problem = warp.cta->shadow.read(address, 16, access)) fail("wgmma: %s", problem);
  };
  Operand(issue.a).for_each_chunk(first_row(warp), kRows, read);
  Operand(issue.b).for_each_chunk(0, issue.n, read);
}

// What the register adds to the product: a number, or a token of a wgmma in flight, which needs no fence.
void take_accumulator(Warp& warp, const Issue& issue, uint32_t lane, uint32_t i, Wgmma& wgmma) {
  uint32_t& bits = issue.registers[issue.accumulators[i]];
  Wgmma* const earlier = is_token(bits) ? find(warp, token_of(bits)) : nullptr;
  if (earlier) {
    if (earlier->n != wgmma.n) fail("wgmma: accumulators of one in flight, of another shape");
    earlier->found[lane][element_of(bits)] = true;
  } else if (!warp.wgmma_fenced) {
    fail("wgmma: no wgmma.fence since the accumulators were accessed");
  }
  wgmma.values[lane][i] = earlier && earlier->executed ? earlier->values[lane][element_of(bits)] : bits;
  bits = token_bits(wgmma.token, i);
}

void track(Thread& thread, const Issue& issue) {
  for (const Registers& known : thread.tracked)
    if (known.base == issue.registers) return;
  thread.tracked.push_back({issue.registers, issue.accumulators, issue.n / 2});
}

void issue_wgmma(Warp& warp, const Lanes& lanes) {
  const Issue& first = *static_cast<Issue*>(lanes[0]);
  follow_warpgroup(warp, first.a, first.b + first.accumulate);
  check_operands(warp, first);
  auto wgmma = std::make_unique<Wgmma>();
  wgmma->type = first.type;
  wgmma->n = first.n;
  wgmma->a = first.a;
  wgmma->b = first.b;
  wgmma->accumulate = first.accumulate;
  wgmma->token = warp.wgmma_count++ % kMaxToken + 1;
  wgmma->group = warp.wgmma_committed + 1;
  for (uint32_t lane = 0; lane < kWarpLanes; ++lane) {
    const Issue& issue = *static_cast<Issue*>(lanes[lane]);
    if (!(issue == first)) fail("wgmma: lane %u differs in operands or shape", lane);
    track(warp.threads[lane], issue);
    for (uint32_t i = 0; i < issue.n / 2; ++i) take_accumulator(warp, issue, lane, i, *wgmma);
  }
  warp.wgmmas.push_back(std::move(wgmma));
  ++machine.in_flight;
}

void wait_for_groups(Warp& warp, const Lanes& lanes) {
  const uint32_t pending = *static_cast<uint32_t*>(lanes[0]);
  const uint32_t done = warp.wgmma_committed > pending ? warp.wgmma_committed - pending : 0;
  while (!warp.wgmmas.empty() && warp.wgmmas.front()->group <= done) {
    while (!warp.wgmmas.front()->executed) run_one_wgmma(warp);
    retire(warp, *warp.wgmmas.front());
    warp.wgmmas.pop_front();
    warp.wgmma_fenced = false;
  }
  uint32_t& known = warp.knowledge.happened[warp.actor(Kind::kWgmmaGroups)];
  known = std::max(known, done);
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
  if (n % 8 || n < 8 || n > 256) fail("wgmma: n of %u", n);
  Issue issue{type, n, registers, accumulators, a, b, accumulate};
  converge("wgmma.mma_async", kEveryLane, true, &issue, issue_wgmma);
}

void track_registers(uint32_t* registers, const uint16_t* indices, uint32_t count) {
  self->tracked.push_back({registers, indices, count});
}

bool run_one_wgmma(Warp& warp) {
  for (auto& wgmma : warp.wgmmas) {
    if (wgmma->executed) continue;
    run(warp, *wgmma);
    pass_on(warp, *wgmma);
    --machine.in_flight;
    return true;
  }
  return false;
}

void check_all_waited(const Warp& warp) {
  if (!warp.wgmmas.empty()) fail("a warp exits with wgmmas that nobody waits for");
  if (warp.bulk_committed > warp.knowledge.happened[warp.actor(Kind::kBulkGroups)] ||
      (!warp.bulk_stores.empty() && warp.bulk_stores.back().group > warp.bulk_committed))
    fail("a warp exits while its bulk stores read shared memory");
}

void check_warpgroups(const Cta& cta) {
  for (uint32_t w = 0; w < cta.num_warps; ++w)
    if (cta.warps[w].warpgroup_step != cta.warpgroup_steps[w / kWarpgroupWarps].size())
      fail("wgmma: the warps of a warpgroup have issued different numbers");
}

}  // namespace hopper
