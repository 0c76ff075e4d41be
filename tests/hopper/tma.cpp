// Bulk copies of boxes by the TMA unit. Each happens at some moment between its issue and the wait that guarantees it.

#include "tma.h"

#include <cstring>

#include "state.h"

namespace hopper {
namespace {

constexpr uint32_t kElementBytes = 2, kStorePiece = 16;  // a row is stored in whole pieces

const TensorMap& tensor_map_at(const void* address) {
  const TensorMap& map = *static_cast<const TensorMap*>(address);
  if (reinterpret_cast<uint64_t>(address) % 64 || map.magic != kTensorMapMagic) fail("TMA: that is no tensor map");
  return map;
}

uint32_t box_bytes(const TensorMap& map) { return map.box_rows * map.box_columns * kElementBytes; }

// A box begins where its swizzle's pattern of eight rows does.
void check_box(Cta& cta, const TensorMap& map, uint32_t address, const char* what) {
  shared_bytes(cta, address, box_bytes(map), map.swizzle == 16 ? 128 : 8 * map.swizzle, what);
}

// Calls visit(offset in shared memory, row and column of the tensor) for each 16 bytes of the box.
template <class Visit>
void for_each_piece(const TensorMap& map, int32_t column, int32_t row, uint32_t address, Visit visit) {
  const uint32_t row_bytes = map.box_columns * kElementBytes;
  for (uint32_t r = 0; r < map.box_rows; ++r)
    for (uint32_t at = 0; at < row_bytes; at += 16)
      visit(swizzle(address + r * row_bytes + at, map.swizzle), int64_t(row) + r,
            int64_t(column) + at / kElementBytes);
}

// How many elements of a 16-byte piece are inside the tensor.
uint32_t elements_inside(const TensorMap& map, int64_t row, int64_t column) {
  constexpr int64_t kElements = 16 / kElementBytes;
  if (row < 0 || row >= int64_t(map.rows) || column < 0) return 0;
  return uint32_t(std::max<int64_t>(0, std::min<int64_t>(kElements, int64_t(map.columns) - column)));
}

void run(const BulkLoad& load) {
  const TensorMap& map = *load.tensor_map;
  for_each_piece(map, load.column, load.row, load.destination, [&](uint32_t at, int64_t row, int64_t column) {
    uint8_t* const piece = load.cta->shared + at;
    std::memset(piece, 0, 16);
    const uint32_t bytes = elements_inside(map, row, column) * kElementBytes;
    if (!bytes) return;
    const uint64_t source = map.address + row * map.row_bytes + column * kElementBytes;
    check_global(source, bytes, "TMA load");
    std::memcpy(piece, reinterpret_cast<const void*>(source), bytes);
  });
  complete_bytes(*load.cta, load.mbarrier, load.phase, box_bytes(map));
}

void run(Warp& warp, const BulkStore& store) {
  const TensorMap& map = *static_cast<const TensorMap*>(store.tensor_map);
  for_each_piece(map, store.column, store.row, store.source, [&](uint32_t at, int64_t row, int64_t column) {
    if (!elements_inside(map, row, column)) return;
    const uint64_t destination = map.address + row * map.row_bytes + column * kElementBytes;
    check_global(destination, kStorePiece, "TMA store");
    std::memcpy(reinterpret_cast<void*>(destination), warp.cta->shared + at, kStorePiece);
  });
}

void issue_load(Cta& cta, const TensorMap& map, int32_t column, int32_t row, uint32_t destination, uint32_t mbarrier) {
  check_box(cta, map, destination, "TMA load");
  const Knowledge& knowledge = self->warp->knowledge;
  Mbarrier& counted = find_mbarrier(cta, mbarrier, "TMA load");
  if (knowledge.happened[counted.init_actor] < counted.init_tick) fail("TMA load: nothing orders it after mbarrier.init");
  if (machine.strict_mbarriers && !counted.published) fail("TMA load: no fence.mbarrier_init after mbarrier.init");
  const uint32_t phase = counted.tick() + 1;
  const Access access{knowledge, counted.actor, phase, true};
  if (const char* problem = cta.shadow.write(destination, box_bytes(map), access)) fail("TMA load: %s", problem);
  machine.bulk_loads.push_back({&cta, &map, column, row, destination, mbarrier, phase});
  ++machine.in_flight;
}

void wait_for_groups(uint32_t pending) {
  yield();
  Warp& warp = *self->warp;
  if (warp.bulk_lane != self->lane && warp.bulk_lane != kWarpLanes)
    return;  // bulk groups belong to a thread, and this one has none
  const uint32_t done = warp.bulk_committed > pending ? warp.bulk_committed - pending : 0;
  while (!warp.bulk_stores.empty() && warp.bulk_stores.front().group <= done) run_one_bulk_store(warp);
  const uint32_t groups = warp.actor(Kind::kBulkGroups);
  warp.knowledge.happened[groups] = std::max(warp.knowledge.happened[groups], done);
}

}  // namespace

void tma_load_2d(uint32_t destination, const void* tensor_map, int32_t column, int32_t row, uint32_t mbarrier) {
  yield();
  Cta &cta = cta_of(destination), &counting = cta_of(mbarrier);
  if (&cta != &counting) fail("TMA load: destination and mbarrier in two CTAs");
  issue_load(cta, tensor_map_at(tensor_map), column, row, destination, mbarrier);
}

// Into every CTA of the mask, at the same place.
void tma_load_2d_multicast(uint32_t destination, const void* tensor_map, int32_t column, int32_t row,
                           uint32_t mbarrier, uint16_t cta_mask) {
  yield();
  if (!cta_mask || cta_mask >> machine.cluster) fail("TMA load: a mask of %x for a cluster of %u", cta_mask, machine.cluster);
  for (uint32_t rank = 0; rank < machine.cluster; ++rank) {
    if (!(cta_mask >> rank & 1)) continue;
    uint32_t there = mapa_shared_cluster(destination, rank), counting = mapa_shared_cluster(mbarrier, rank);
    Cta& cta = cta_of(there);
    cta_of(counting);
    issue_load(cta, tensor_map_at(tensor_map), column, row, there, counting);
  }
}

void tma_store_2d(const void* tensor_map, int32_t column, int32_t row, uint32_t source) {
  yield();
  Warp& warp = *self->warp;
  const TensorMap& map = tensor_map_at(tensor_map);
  check_box(*warp.cta, map, source, "TMA store");
  if (warp.bulk_lane != kWarpLanes && warp.bulk_lane != self->lane) fail("TMA store: two lanes of a warp store");
  warp.bulk_lane = self->lane;
  const uint32_t group = warp.bulk_committed + 1;
  const Access access{warp.knowledge, warp.actor(Kind::kBulkGroups), group, true};
  if (const char* problem = warp.cta->shadow.read(source, box_bytes(map), access)) fail("TMA store: %s", problem);
  warp.bulk_stores.push_back({tensor_map, column, row, source, group});
  ++machine.in_flight;
}

void bulk_commit_group() {
  yield();
  if (self->warp->bulk_lane == self->lane) ++self->warp->bulk_committed;
}

void bulk_wait_group_read(uint32_t pending) { wait_for_groups(pending); }
void bulk_wait_group(uint32_t pending) { wait_for_groups(pending); }

void prefetch_tensormap(const void* tensor_map) { tensor_map_at(tensor_map); }

bool run_one_bulk_load() {
  if (machine.bulk_loads.empty()) return false;
  std::swap(machine.bulk_loads[machine.random() % machine.bulk_loads.size()], machine.bulk_loads.back());
  const BulkLoad load = machine.bulk_loads.back();
  machine.bulk_loads.pop_back();
  --machine.in_flight;
  if (!load.cta->live_threads) fail("a bulk copy into a CTA that has exited");
  run(load);
  return true;
}

bool run_one_bulk_store(Warp& warp) {
  if (warp.bulk_stores.empty()) return false;
  const size_t chosen = self ? 0 : machine.random() % warp.bulk_stores.size();
  const BulkStore store = warp.bulk_stores[chosen];
  warp.bulk_stores.erase(warp.bulk_stores.begin() + chosen);
  --machine.in_flight;
  run(warp, store);
  return true;
}

}  // namespace hopper
