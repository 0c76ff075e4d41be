// The emulated Hopper as a kernel sees it: a function for each PTX instruction that is more than arithmetic.
//
// A kernel is a C++ function that every thread runs, as a fiber of its own. Shared addresses are 32 bits wide, as in
// PTX; global and generic addresses are the host's. What breaks a rule of the PTX ISA ends the launch with an error.
#pragma once

#include <cstdint>

namespace hopper {

// A kernel's code, exported as kernel_ and its name: args[i] points to parameter i, as for cudaLaunchKernel.
using Body = void (*)(void* const* args);

// Where the running thread is in its source, for messages: a line of the PTX.
extern uint32_t site;

// Ends the launch with an error.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- special registers ----
uint32_t tid_x();
uint32_t ntid_x();
uint32_t ctaid_x();
uint32_t nctaid_x();

// ---- memory ----
uint32_t dynamic_shared();  // address of the launch's dynamic shared memory
uint64_t cvta_shared(uint32_t address);  // generic address of a shared one; and back
uint32_t cvta_to_shared(uint64_t address);
void ld_shared(uint32_t address, void* value, uint32_t bytes);
void st_shared(uint32_t address, const void* value, uint32_t bytes);
void ld_global(uint64_t address, void* value, uint32_t bytes);
void st_global(uint64_t address, const void* value, uint32_t bytes);
void fence_proxy_async();

// ---- mbarriers, and named barriers ----
void mbarrier_init(uint32_t address, uint32_t count);
void mbarrier_inval(uint32_t address);
void fence_mbarrier_init();
void mbarrier_arrive_expect_tx(uint32_t address, uint32_t bytes);
inline void mbarrier_arrive(uint32_t address) { mbarrier_arrive_expect_tx(address, 0); }
bool mbarrier_try_wait_parity(uint32_t address, uint32_t parity);  // suspends the thread; may fail now and then
void bar_sync(uint32_t id, uint32_t threads);  // 0 threads: all of the CTA

// ---- bulk copies by TMA. Coordinates: of the box's first column and row ----
// CUtensorMap's 128 bytes, as this emulation fills them in.
constexpr uint64_t kTensorMapMagic = 0x70616d726f736e74;
struct alignas(64) TensorMap {
  uint64_t magic, address;
  uint64_t columns, rows, row_bytes;  // of the tensor, with elements of 2 bytes
  uint32_t box_columns, box_rows;
  uint32_t swizzle;  // bytes of a row in which it repeats: 128, 64, 32; 16 without

  uint32_t box_row_bytes() const { return box_columns * 2; }
  uint32_t box_bytes() const { return box_rows * box_row_bytes(); }
  uint32_t box_alignment() const { return 8 * swizzle; }  // of its swizzle's eight rows
};
static_assert(sizeof(TensorMap) <= 128);

void tma_load_2d(uint32_t destination, uint64_t tensor_map, int32_t column, int32_t row, uint32_t mbarrier);
void tma_store_2d(uint64_t tensor_map, int32_t column, int32_t row, uint32_t source);
void bulk_commit_group();
void bulk_wait_group(uint32_t pending);  // with .read or without
void prefetch_tensormap(uint64_t tensor_map);

// ---- warps ----
void setmaxnreg_inc(uint32_t registers);
void setmaxnreg_dec(uint32_t registers);
bool vote_any(bool predicate, uint32_t mask);
bool vote_all(bool predicate, uint32_t mask);
bool elect_sync(uint32_t mask, uint32_t& leader);
uint32_t shfl_idx(uint32_t value, uint32_t lane, uint32_t clamp, uint32_t mask);
inline uint32_t shfl_bfly(uint32_t value, uint32_t lane_mask, uint32_t clamp, uint32_t mask) {
  return shfl_idx(value, tid_x() % 32 ^ lane_mask, clamp, mask);
}
void stmatrix_x4(uint32_t address, const uint32_t (&values)[4]);  // .m8n8.x4.shared.b16

// ---- wgmma.mma_async m64nNk16: float32 accumulators, both operands K-major in shared memory ----
enum class Half { kBfloat16, kFloat16 };
void wgmma_fence();
void wgmma_commit_group();
void wgmma_wait_group(uint32_t pending);
// Adds to the thread's N / 2 accumulators. Until waited for they hold signalling NaNs.
void wgmma(Half type, uint32_t n, uint32_t* const* accumulators, uint64_t a, uint64_t b, bool accumulate);
// Registers of the thread that may hold accumulators in flight, copies included: where wgmma_wait_group writes results.
void track_registers(uint32_t* registers, uint32_t count);

}  // namespace hopper

// ---- launches, for those who drive the emulation ----
extern "C" {
// Runs a kernel to its end; 0, or -1 with a message in hopper_error. `shared_bytes`: of dynamic shared memory, which
// begins `misalignment` bytes after a multiple of 1024.
int hopper_launch(hopper::Body kernel, uint32_t grid, uint32_t threads, uint32_t shared_bytes, uint32_t misalignment,
                  void* const* arguments);
const char* hopper_error();
}
