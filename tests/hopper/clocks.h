// What has happened before what: vector clocks, and who last touched each word of shared memory.
//
// Every warp counts its own releases; its wgmma groups, its bulk groups and every mbarrier's phases count as actors of
// their own, because what they do is asynchronous. An access is a race unless whoever makes it knows that the earlier
// ones have ended, whatever the order in which the emulation happened to run them.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace hopper {

constexpr uint32_t kMaxWarps = 16, kMaxMbarriers = 24;
// Actors, in this order. The first three kinds can read shared memory.
enum class Kind : uint32_t { kWarp, kWgmmaGroups, kBulkGroups, kMbarrier };
constexpr uint32_t kReaders = 3 * kMaxWarps, kActors = kReaders + kMaxMbarriers;

inline uint32_t actor(Kind kind, uint32_t index) { return uint32_t(kind) * kMaxWarps + index; }

using Clock = std::array<uint32_t, kActors>;

inline void join(Clock& into, const Clock& from) {
  for (uint32_t i = 0; i < kActors; ++i) into[i] = std::max(into[i], from[i]);
}

// What an actor knows to have happened, and what of that a fence.proxy.async has shown to the async proxy.
struct Knowledge {
  Clock happened{}, proxied{};

  void join(const Knowledge& other) {
    hopper::join(happened, other.happened);
    hopper::join(proxied, other.proxied);
  }
};

// An access to shared memory: by whom, at which tick of its clock, knowing what.
struct Access {
  const Knowledge& knowledge;
  uint32_t actor, tick;
  bool async;  // by the async proxy
};

// The last accesses to shared memory: writes by 4-byte word, reads by 16-byte chunk.
class Shadow {
 public:
  explicit Shadow(uint32_t bytes) : writes_((bytes + 3) / 4), reads_((bytes + 15) / 16) {}

  // Record the access; nullptr, or which rule it breaks.
  const char* read(uint32_t begin, uint32_t bytes, const Access& access) {
    for (uint32_t word = begin / 4; word <= (begin + bytes - 1) / 4; ++word)
      if (const char* problem = check_written(writes_[word], access)) return problem;
    for (uint32_t chunk = begin / 16; chunk <= (begin + bytes - 1) / 16; ++chunk)
      reads_[chunk][access.actor] = access.tick;
    return nullptr;
  }

  const char* write(uint32_t begin, uint32_t bytes, const Access& access) {
    for (uint32_t chunk = begin / 16; chunk <= (begin + bytes - 1) / 16; ++chunk)
      if (const char* problem = check_read(reads_[chunk], access)) return problem;
    for (uint32_t word = begin / 4; word <= (begin + bytes - 1) / 4; ++word) {
      if (writes_[word].tick)
        if (const char* problem = check_written(writes_[word], access)) return problem;
      writes_[word] = {uint16_t(access.actor), access.async, access.tick};
    }
    return nullptr;
  }

  // As `write`, without a check: for what nobody may touch while it is there.
  void own(uint32_t begin, uint32_t bytes, uint32_t owner, uint32_t tick) {
    for (uint32_t word = begin / 4; word < (begin + bytes) / 4; ++word) writes_[word] = {uint16_t(owner), false, tick};
  }

  // Whether an ordinary store of another warp was the last here.
  bool written_by_other_warp(uint32_t begin, const Access& access) const {
    const Write& write = writes_[begin / 4];
    return write.tick && !write.async && write.actor != access.actor && write.actor < kMaxWarps;
  }

 private:
  struct Write {
    uint16_t actor = 0;
    bool async = false;
    uint32_t tick = 0;  // 0: never written
  };

  const char* check_written(const Write& write, const Access& access) const {
    if (!write.tick) return "shared memory that nobody has written";
    if (write.tick == UINT32_MAX) return "shared memory that holds an mbarrier";
    if (write.tick > access.knowledge.happened[write.actor])
      return write.async ? "a race with a bulk copy that writes here" : "a race with a store of another warp";
    if (access.async && !write.async && write.tick > access.knowledge.proxied[write.actor])
      return "an ordinary store without fence.proxy.async before the async proxy";
    return nullptr;
  }

  const char* check_read(const std::array<uint32_t, kReaders>& reads, const Access& access) const {
    for (uint32_t i = 0; i < kReaders; ++i)
      if (reads[i] > access.knowledge.happened[i]) return kReaderRaces[i / kMaxWarps];
    return nullptr;
  }

  static constexpr const char* kReaderRaces[] = {"a race with a load of another warp", "a race with a wgmma that reads here",
                                                 "a race with a bulk copy that reads here"};
  std::vector<Write> writes_;
  std::vector<std::array<uint32_t, kReaders>> reads_;
};

}  // namespace hopper
