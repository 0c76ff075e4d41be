// Ordinary loads and stores, the addresses of the shared window, and the fence between the proxies.

#include <cstring>

#include "state.h"

namespace hopper {
namespace {

void* global(uint64_t address, uint32_t bytes, const char* what) {
  if (address % bytes) fail("%s: the address is not a multiple of %u", what, bytes);
  check_global(address, bytes, what);
  return reinterpret_cast<void*>(address);
}

}  // namespace

uint8_t* shared_bytes(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what) {
  if (address % alignment) fail("%s: shared address %u is not a multiple of %u", what, address, alignment);
  if (address < cta->shared_begin || address + bytes > cta->shared_end)
    fail("%s: shared bytes %u to %u of %u to %u", what, address, address + bytes, cta->shared_begin, cta->shared_end);
  return cta->shared + address;
}

void check_global(uint64_t address, uint64_t bytes, const char* what) {
  bool inside = machine.global.empty();
  for (const auto& [begin, end] : machine.global) inside |= begin <= address && address + bytes <= end;
  if (!inside) fail("%s: %u bytes of global memory out of bounds", what, uint32_t(bytes));
}

uint32_t dynamic_shared() { return cta->shared_begin; }
uint64_t cvta_shared(uint32_t address) { return reinterpret_cast<uint64_t>(cta->shared) + address; }
uint32_t cvta_to_shared(uint64_t address) {
  const uint64_t offset = address - cvta_shared(0);
  if (offset >= kWindowBytes) fail("cvta.to.shared of an address that is not in shared memory");
  return uint32_t(offset);
}

void ld_shared(uint32_t address, void* value, uint32_t bytes) {
  yield();
  std::memcpy(value, shared_bytes(address, bytes, bytes, "ld.shared"), bytes);
  const Access access = self->warp->access(Kind::kWarp, self->warp->tick(Kind::kWarp));
  if (const char* problem = cta->shadow.read(address, bytes, access)) fail("ld.shared: %s", problem);
}

void st_shared(uint32_t address, const void* value, uint32_t bytes) {
  yield();
  store_shared(*self->warp, address, value, bytes, 1u << self->lane, "st.shared");
}

void store_shared(Warp& warp, uint32_t address, const void* value, uint32_t bytes, uint32_t lanes, const char* what) {
  uint8_t* const memory = shared_bytes(address, bytes, bytes, what);
  Shadow& shadow = cta->shadow;
  const Access access = warp.access(Kind::kWarp, warp.tick(Kind::kWarp));
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
