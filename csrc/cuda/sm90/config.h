// The shape of a tile and of the pipeline that feeds it.
//
// Ping-pong: the two consumers take the tiles in turn, so that the epilogue of one overlaps with the MMAs of the other.
// On an H200 tiles of 128 × 256 that both compute, and clusters of two CTAs that share their texts by multicast, were slower.
#pragma once

namespace siglip::sm90 {

// Images and texts of a tile, features of a stage.
constexpr int kBlockM = 128, kBlockN = 128, kBlockK = 64;

constexpr int kNumConsumers = 2;
constexpr int kNumStages = 5;
constexpr int kWarpsPerWarpgroup = 4;
constexpr int kNumSlices = 4;  // of a tile, in the epilogue: 64 × 64 each

// Each warp writes its own partial sums, so that no atomics make the result depend on their order.
constexpr int kPartialsPerTile = kWarpsPerWarpgroup;

}  // namespace siglip::sm90
