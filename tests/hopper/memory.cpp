// Ordinary loads and stores, the addresses of the shared window, and the fence between the proxies.

#include <cstring>

#include "state.h"

namespace hopper {
namespace {

// shared::cluster: the upper 8 bits hold a CTA's rank plus 1; 0: the running thread's own CTA.
constexpr uint32_t kRankShift = 24, kOffsetMask = (1u << kRankShift) - 1;

void* global(uint64_t address, uint32_t bytes, const char* what) {
  if (address % bytes) fail("%s: the address is not a multiple of %u", what, bytes);
  check_global(address, bytes, what);
  return reinterpret_cast<void*>(address);
}

}  // namespace

Cta& cta_of(uint32_t& address) {
  const uint32_t rank = address >> kRankShift;
  address &= kOffsetMask;
  if (!rank) return *self->warp->cta;
  if (rank > machine.cluster) fail("a shared address in CTA %u of a cluster of %u", rank - 1, machine.cluster);
  Cta& cta = *machine.ctas[rank - 1];
  if (!cta.live_threads) fail("shared memory of CTA %u of the cluster, which has exited", rank - 1);
  return cta;
}

uint8_t* shared_bytes(Cta& cta, uint32_t address, uint32_t bytes, uint32_t alignment, const char* what) {
  if (address % alignment) fail("%s: shared address %u is not a multiple of %u", what, address, alignment);
  if (address < cta.shared_begin || address + bytes > cta.shared_end)
    fail("%s: shared bytes %u to %u of %u to %u", what, address, address + bytes, cta.shared_begin, cta.shared_end);
  return cta.shared + address;
}

void check_global(uint64_t address, uint64_t bytes, const char* what) {
  bool inside = machine.global.empty();
  for (const auto& [begin, end] : machine.global) inside |= begin <= address && address + bytes <= end;
  if (!inside) fail("%s: %u bytes of global memory out of bounds", what, uint32_t(bytes));
}

uint32_t dynamic_shared() { return self->warp->cta->shared_begin; }
uint64_t cvta_shared(uint32_t address) { return reinterpret_cast<uint64_t>(self->warp->cta->shared) + address; }
uint32_t cvta_to_shared(uint64_t address) {
  const uint64_t offset = address - reinterpret_cast<uint64_t>(self->warp->cta->shared);
  if (offset >= kWindowBytes) fail("cvta.to.shared of an address that is not in shared memory");
  return uint32_t(offset);
}
uint32_t mapa_shared_cluster(uint32_t address, uint32_t rank) {
  if (rank >= machine.cluster) fail("mapa: CTA %u of a cluster of %u", rank, machine.cluster);
  return (address & kOffsetMask) | (rank + 1) << kRankShift;
}

void ld_shared(uint32_t address, void* value, uint32_t bytes) {
  yield();
  Warp& warp = *self->warp;
  std::memcpy(value, shared_bytes(*warp.cta, address, bytes, bytes, "ld.shared"), bytes);
  const Access access{warp.knowledge, warp.actor(Kind::kWarp), warp.tick(Kind::kWarp), false};
  if (const char* problem = warp.cta->shadow.read(address, bytes, access)) fail("ld.shared: %s", problem);
}

void st_shared(uint32_t address, const void* value, uint32_t bytes) {
  yield();
  store_shared(*self->warp, address, value, bytes, 1u << self->lane, "st.shared");
}

void store_shared(Warp& warp, uint32_t address, const void* value, uint32_t bytes, uint32_t lanes, const char* what) {
  uint8_t* const memory = shared_bytes(*warp.cta, address, bytes, bytes, what);
  Shadow& shadow = warp.cta->shadow;
  const Access access{warp.knowledge, warp.actor(Kind::kWarp), warp.tick(Kind::kWarp), false};
  // Warps may store the same value to the same place; Triton does.
  if (shadow.written_by_other_warp(address, access) && std::memcmp(memory, value, bytes) == 0)
    shadow.own(address, bytes, access.actor, access.tick);
  else if (const char* problem = shadow.write(address, bytes, access))
    fail("%s: %s", what, problem);
  std::memcpy(memory, value, bytes);
  warp.proxy_fenced &= ~lanes;
}

void ld_global(uint64_t address, void* value, uint32_t bytes) {
  std::memcpy(value, global(address, bytes, "ld.global"), bytes);
}
void st_global(uint64_t address, const void* value, uint32_t bytes) {
  std::memcpy(global(address, bytes, "st.global"), value, bytes);
}

// Shows the async proxy what the warp knows of other warps' stores; its own too, once every lane has been here.
void fence_proxy_async() {
  yield();
  Warp& warp = *self->warp;
  uint32_t& own = warp.knowledge.proxied[warp.actor(Kind::kWarp)];
  const uint32_t shown = own;
  warp.proxy_fenced |= 1u << self->lane;
  join(warp.knowledge.proxied, warp.knowledge.happened);
  if ((warp.proxy_fenced | warp.exited) != kEveryLane) own = shown;
}

}  // namespace hopper
