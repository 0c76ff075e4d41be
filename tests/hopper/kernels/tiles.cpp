// A box is loaded, and stored again or multiplied by itself.
#include "machine.h"
#include <cstring>
using namespace hopper;
// args: tensor map of the source, of the destination, {span, rows, columns, row of the box, column of the box, n}, out
struct Box { uint32_t span, rows, columns; int32_t row, column; uint32_t n, bfloat16; };
static void load(void* const* args, const Box& box, uint32_t tile, uint32_t barrier) {
  if (tid_x() == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(barrier, box.rows * box.columns * 2);
    tma_load_2d(tile, reinterpret_cast<uint64_t>(args[0]), box.column, box.row, barrier);
  }
  bar_sync(0, 0);
  while (!mbarrier_try_wait_parity(barrier, 0)) {}
}
extern "C" void kernel_copy(void* const* args) {
  const Box& box = *static_cast<const Box*>(args[2]);
  const uint32_t tile = dynamic_shared();
  load(args, box, tile, tile + 32768);
  if (tid_x() == 0) {
    tma_store_2d(reinterpret_cast<uint64_t>(args[1]), 0, 0, tile);
    bulk_commit_group();
    bulk_wait_group(0);
  }
}
// out [64, n] = tile [64, 16] · tile [n, 16]ᵀ, for every 16 columns of the box.
extern "C" void kernel_multiply(void* const* args) {
  const Box& box = *static_cast<const Box*>(args[2]);
  const uint32_t tile = dynamic_shared(), lane = tid_x() % 32, warp = tid_x() / 32;
  load(args, box, tile, tile + 32768);
  uint32_t registers[256];
  uint32_t* accumulators[128];
  for (int i = 0; i < 128; ++i) accumulators[i] = &registers[i];
  track_registers(registers, 256);
  const uint64_t mode = box.span == 128 ? 1 : box.span == 64 ? 2 : 3;
  wgmma_fence();
  for (uint32_t k = 0; k < box.columns; k += 16) {
    const uint64_t desc = mode << 62 | uint64_t(box.span * 8 >> 4) << 32 | uint64_t(1) << 16 | (tile + k * 2) >> 4;
    wgmma(box.bfloat16 ? Half::kBfloat16 : Half::kFloat16, box.n, accumulators, desc, desc, k > 0);
  }
  wgmma_commit_group();
  for (uint32_t i = 0; i < box.n / 2; ++i) registers[128 + i] = registers[i];
  wgmma_wait_group(0);
  for (uint32_t i = 0; i < box.n / 2; ++i) {
    const uint32_t row = warp * 16 + lane / 4 + (i & 2) * 4, column = i / 4 * 8 + lane % 4 * 2 + (i & 1);
    static_cast<uint32_t*>(args[3])[row * box.n + column] = registers[i];
    if (registers[128 + i] != registers[i]) fail("a copy of an accumulator in flight is not the accumulator");
  }
}
