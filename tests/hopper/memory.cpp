// Loads and stores, the fence between the proxies, and bulk copies of boxes by the TMA unit. Each copy happens at some
// moment between its issue and the wait that guarantees it.

#include <cstring>

#include "state.h"

namespace hopper {
namespace {

constexpr uint32_t kPieceBytes = 16;

void* global_bytes(uint64_t address, uint32_t bytes, uint32_t alignment, const char* what) {
  if (address % alignment) fail("%s: the address is not a multiple of %u", what, alignment);
  bool inside = machine.global.empty();
  for (const auto& [begin, end] : machine.global) inside |= begin <= address && address + bytes <= end;
  if (!inside) fail("%s: %u bytes of global memory out of bounds", what, bytes);
  return reinterpret_cast<void*>(address);
}

// An ordinary store of these lanes of the running warp.
void store_shared(uint32_t address, const void* value, uint32_t bytes, uint32_t lanes) {
  uint8_t* const memory = shared_bytes(address, bytes, bytes);
  // Warps may store the same value to the same place; Triton does.
  const bool repeats = cta->shadow.written_by_other_warp(address, warp().index) && !std::memcmp(memory, value, bytes);
  cta->shadow.write(address, bytes, warp().event(), warp().known, !repeats);
  std::memcpy(memory, value, bytes);
  warp().proxy_fenced &= ~lanes;
}

const TensorMap& tensor_map_at(uint64_t address) {
  const TensorMap& map = *reinterpret_cast<const TensorMap*>(address);
  if (address % alignof(TensorMap) || map.magic != kTensorMapMagic) fail("that is no tensor map");
  return map;
}

// Copies what of a box is inside the tensor, 16 bytes at a time. A load fills the rest with zeros; a store stores a
// row's last 16 bytes whole, beyond the tensor's last column.
void copy_box(const TensorMap& map, int32_t column, int32_t row, uint32_t address, bool is_load) {
  for (uint32_t at = 0; at < map.box_bytes(); at += kPieceBytes) {
    const int64_t r = row + int64_t(at / map.box_row_bytes()), begin = int64_t(column) * 2 + at % map.box_row_bytes();
    const int64_t rest = map.columns * 2 - begin;  // of the row
    uint8_t* const shared = cta->shared + swizzle(address + at, map.swizzle);
    if (is_load) std::memset(shared, 0, kPieceBytes);
    if (r < 0 || r >= int64_t(map.rows) || begin < 0 || rest <= 0) continue;
    const uint32_t bytes = is_load ? std::min<int64_t>(kPieceBytes, rest) : kPieceBytes;
    const uint64_t at_global = map.address + r * map.row_bytes + begin;
    void* const global = global_bytes(at_global, bytes, 1, is_load ? "TMA load" : "TMA store");
    std::memcpy(is_load ? shared : global, is_load ? global : shared, bytes);
  }
}

}  // namespace

uint8_t* shared_bytes(uint32_t address, uint32_t bytes, uint32_t alignment) {
  if (address % alignment) fail("shared address %u is not a multiple of %u", address, alignment);
  if (address < cta->shared_begin || address + bytes > cta->shared_end)
    fail("shared bytes %u to %u of %u to %u", address, address + bytes, cta->shared_begin, cta->shared_end);
  return cta->shared + address;
}

uint32_t dynamic_shared() { return cta->shared_begin; }
uint64_t cvta_shared(uint32_t address) { return reinterpret_cast<uint64_t>(cta->shared) + address; }
uint32_t cvta_to_shared(uint64_t address) {
  const uint64_t offset = address - cvta_shared(0);
  if (offset >= kWindowBytes) fail("cvta.to.shared of an address that is not in shared memory");
  return uint32_t(offset);
}

void ld_shared(uint32_t address, void* value, uint32_t bytes) {
  const Instruction now("ld.shared");
  std::memcpy(value, shared_bytes(address, bytes, bytes), bytes);
  cta->shadow.read(address, bytes, warp().event(), warp().known);
}

void st_shared(uint32_t address, const void* value, uint32_t bytes) {
  const Instruction now("st.shared");
  store_shared(address, value, bytes, 1u << self->lane);
}

// Lane l passes the address of row l % 8 of matrix l / 8, and of each matrix row l / 4, columns l % 4 · 2 and the next.
void stmatrix_x4(uint32_t address, const uint32_t (&values)[4]) {
  const Operands own = {address, values[0], values[1], values[2], values[3]};
  converge("stmatrix", kEveryLane, true, own, [](const Lanes& lanes) {
    uint32_t banks[4]{};  // that a matrix has stored to
    for (uint32_t lane = 0; lane < kWarpLanes; ++lane) {
      const uint32_t matrix = lane / 8, at = uint32_t(lanes[lane][0]), bank = 1u << (at / 16 % 8);
      uint32_t words[4];
      for (uint32_t i = 0; i < 4; ++i) words[i] = uint32_t(lanes[lane % 8 * 4 + i][1 + matrix]);
      store_shared(at, words, sizeof words, kEveryLane);
      machine.stmatrix_conflicts += (banks[matrix] & bank) != 0;
      banks[matrix] |= bank;
    }
  });
}

void ld_global(uint64_t address, void* value, uint32_t bytes) {
  std::memcpy(value, global_bytes(address, bytes, bytes, "ld.global"), bytes);
}
void st_global(uint64_t address, const void* value, uint32_t bytes) {
  std::memcpy(global_bytes(address, bytes, bytes, "st.global"), value, bytes);
}

// Shows the async proxy what the warp knows of other warps' stores; its own too, once every lane has been here.
void fence_proxy_async() {
  const Instruction now("fence.proxy.async");
  warp().proxy_fenced |= 1u << self->lane;
  const bool all_lanes = (warp().proxy_fenced | warp().exited) == kEveryLane;
  for (uint32_t other = 0; other < kMaxWarps; ++other)
    if (all_lanes || other != warp().index) warp().known.ticks[actor(kShown, other)] = warp().known.ticks[other];
}

void tma_load_2d(uint32_t destination, uint64_t tensor_map, int32_t column, int32_t row, uint32_t address) {
  const Instruction now("TMA load");
  const TensorMap& map = tensor_map_at(tensor_map);
  shared_bytes(destination, map.box_bytes(), map.box_alignment());
  Barrier& mbarrier = find_mbarrier(address);
  if (machine.strict_mbarriers && !mbarrier.published) fail("no fence.mbarrier_init after mbarrier.init");
  const Event phase{mbarrier.actor, mbarrier.completed + 1};
  cta->shadow.write(destination, map.box_bytes(), phase, warp().known);
  cta->in_flight.push_back({phase, [=, &map, &mbarrier] {
    if (!cta->live_threads) fail("a bulk copy into a CTA that has exited");
    copy_box(map, column, row, destination, true);
    if (mbarrier.completed + 1 != phase.tick) fail("the mbarrier's phase ended before the bytes of a bulk copy came");
    advance(mbarrier, 0, map.box_bytes());
  }});
}

void tma_store_2d(uint64_t tensor_map, int32_t column, int32_t row, uint32_t source) {
  const Instruction now("TMA store");
  const TensorMap& map = tensor_map_at(tensor_map);
  shared_bytes(source, map.box_bytes(), map.box_alignment());
  if (warp().bulk_lane != kWarpLanes && warp().bulk_lane != self->lane) fail("two lanes of a warp store");
  warp().bulk_lane = self->lane;
  const Event group = warp().group(kBulkGroups);
  warp().bulk_issued = group.tick;
  cta->shadow.read(source, map.box_bytes(), group, warp().known);
  cta->in_flight.push_back({group, [=, &map] { copy_box(map, column, row, source, false); }});
}

// Bulk groups belong to a thread: a lane that stores nothing has none.
void bulk_commit_group() {
  if (warp().bulk_lane == self->lane) warp().committed[kBulkGroups] = warp().bulk_issued;
}

void bulk_wait_group(uint32_t pending) {
  const Instruction now("cp.async.bulk.wait_group");
  if (warp().bulk_lane == self->lane) wait_groups(kBulkGroups, pending);
}

void prefetch_tensormap(uint64_t tensor_map) { tensor_map_at(tensor_map); }

}  // namespace hopper
