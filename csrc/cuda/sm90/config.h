// The tile's configuration. A library has one, chosen when it is compiled; the default is what is shipped.
//
// Ping-pong (128 columns): the two consumers take the tiles in turn, so that the epilogue of one overlaps with the MMAs
// of the other. Cooperative (256 columns): each computes 64 rows of every tile. A cluster's CTAs compute tiles of the
// same texts, which they load once, by multicast.
#pragma once

#if !defined(SIGLIP_SM90_BLOCK_N)
#define SIGLIP_SM90_BLOCK_N 128
#endif
#if !defined(SIGLIP_SM90_CLUSTER)
#define SIGLIP_SM90_CLUSTER 1
#endif

namespace siglip::sm90 {

// Images and texts of a tile, features of a stage.
constexpr int kBlockM = 128, kBlockN = SIGLIP_SM90_BLOCK_N, kBlockK = 64;
constexpr int kClusterSize = SIGLIP_SM90_CLUSTER;
constexpr bool kPingPong = kBlockN == 128;
static_assert(kBlockN == 128 || kBlockN == 256);
static_assert(kClusterSize == 1 || kClusterSize == 2);

constexpr int kNumConsumers = 2;
constexpr int kConsumersPerTile = kPingPong ? 1 : kNumConsumers;
constexpr int kConsumerRows = kBlockM / kConsumersPerTile;  // images of a tile that one consumer computes
constexpr int kNumSlices = 4;  // of a consumer's part, in the epilogue: 64 × 64 each
constexpr int kNumStages = kPingPong ? 5 : 3;
constexpr int kWarpsPerWarpgroup = 4;

// Each warp of a tile's consumers writes its own partial sums, so that no atomics make the result depend on their order.
constexpr int kPartialsPerTile = kWarpsPerWarpgroup * kConsumersPerTile;

}  // namespace siglip::sm90
