// Bulk copies of boxes by the TMA unit. Each happens at some moment between its issue and the wait that guarantees it.

#include "tma.h"

#include <algorithm>
#include <cstring>

#include "state.h"

namespace hopper {
namespace {

constexpr uint32_t kElementBytes = 2, kPieceBytes = 16, kPieceElements = kPieceBytes / kElementBytes;

const TensorMap& tensor_map_at(const void* address) {
  const TensorMap& map = *static_cast<const TensorMap*>(address);
  if (reinterpret_cast<uint64_t>(address) % 64 || map.magic != kTensorMapMagic) fail("TMA: that is no tensor map");
  return map;
}

uint32_t box_bytes(const TensorMap& map) { return map.box_rows * map.box_columns * kElementBytes; }

// A box begins where its swizzle's pattern of eight rows does.
void check_box(const TensorMap& map, uint32_t address, const char* what) {
  shared_bytes(address, box_bytes(map), map.swizzle == 16 ? 128 : 8 * map.swizzle, what);
}

// Calls visit(shared memory, global memory, elements of it inside the tensor) for each 16 bytes of the box.
template <class Visit>
void for_each_piece(const TensorMap& map, int32_t column, int32_t row, uint32_t address, Visit visit) {
  const uint32_t row_bytes = map.box_columns * kElementBytes;
  for (uint32_t at = 0; at < box_bytes(map); at += kPieceBytes) {
    const int64_t r = int64_t(row) + at / row_bytes, c = int64_t(column) + at % row_bytes / kElementBytes;
    const bool inside = r >= 0 && r < int64_t(map.rows) && c >= 0 && c < int64_t(map.columns);
    visit(cta->shared + swizzle(address + at, map.swizzle), map.address + r * map.row_bytes + c * kElementBytes,
          inside ? uint32_t(std::min<int64_t>(kPieceElements, int64_t(map.columns) - c)) : 0);
  }
}

}  // namespace

void tma_load_2d(uint32_t destination, const void* tensor_map, int32_t column, int32_t row, uint32_t address) {
  yield();
  const TensorMap& map = tensor_map_at(tensor_map);
  check_box(map, destination, "TMA load");
  Mbarrier& mbarrier = find_mbarrier(address, "TMA load");
  if (machine.strict_mbarriers && !mbarrier.published) fail("TMA load: no fence.mbarrier_init after mbarrier.init");
  const uint32_t phase = mbarrier.tick() + 1;
  const Access access{self->warp->knowledge, mbarrier.actor, phase, true};
  if (const char* problem = cta->shadow.write(destination, box_bytes(map), access)) fail("TMA load: %s", problem);
  cta->in_flight.push_back({nullptr, 0, false, [=, &map, &mbarrier] {
    if (!cta->live_threads) fail("a bulk copy into a CTA that has exited");
    for_each_piece(map, column, row, destination, [](uint8_t* shared, uint64_t global, uint32_t elements) {
      std::memset(shared, 0, kPieceBytes);
      if (!elements) return;
      check_global(global, elements * kElementBytes, "TMA load");
      std::memcpy(shared, reinterpret_cast<const void*>(global), elements * kElementBytes);
    });
    complete_bytes(mbarrier, phase, box_bytes(map));
  }});
}

// A row's last 16 bytes are stored whole, beyond the tensor's last column.
void tma_store_2d(const void* tensor_map, int32_t column, int32_t row, uint32_t source) {
  yield();
  Warp& warp = *self->warp;
  const TensorMap& map = tensor_map_at(tensor_map);
  check_box(map, source, "TMA store");
  if (warp.bulk_lane != kWarpLanes && warp.bulk_lane != self->lane) fail("TMA store: two lanes of a warp store");
  warp.bulk_lane = self->lane;
  warp.bulk_issued = warp.bulk_committed + 1;
  const Access access = warp.access(Kind::kBulkGroups, warp.bulk_issued);
  if (const char* problem = cta->shadow.read(source, box_bytes(map), access)) fail("TMA store: %s", problem);
  cta->in_flight.push_back({&warp, warp.bulk_issued, false, [=, &map] {
    for_each_piece(map, column, row, source, [](uint8_t* shared, uint64_t global, uint32_t elements) {
      if (!elements) return;
      check_global(global, kPieceBytes, "TMA store");
      std::memcpy(reinterpret_cast<void*>(global), shared, kPieceBytes);
    });
  }});
}

// Bulk groups belong to a thread: a lane that stores nothing has none.
void bulk_commit_group() {
  yield();
  if (self->warp->bulk_lane == self->lane) self->warp->bulk_committed = self->warp->bulk_issued;
}

void bulk_wait_group(uint32_t pending) {
  yield();
  Warp& warp = *self->warp;
  if (warp.bulk_lane != self->lane || warp.bulk_committed <= pending) return;
  const uint32_t done = warp.bulk_committed - pending;
  while (run_async([&](const Async& async) { return async.warp == &warp && async.group && async.group <= done; })) {
  }
  warp.tick(Kind::kBulkGroups) = std::max(warp.tick(Kind::kBulkGroups), done);
}

void prefetch_tensormap(const void* tensor_map) { tensor_map_at(tensor_map); }

}  // namespace hopper
