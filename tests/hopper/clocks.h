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

#include "machine.h"

namespace hopper {

constexpr uint32_t kMaxWarps = 16, kMaxMbarriers = 24;
// Actors, in this order. The first three kinds can read shared memory; all but the first are of the async proxy.
// kShown: what of a warp's stores a fence.proxy.async has shown to that proxy.
enum Kind : uint32_t { kWarp, kWgmmaGroups, kBulkGroups, kShown, kMbarrier };
constexpr const char* kReaderNames[] = {"load of another warp", "wgmma that reads here", "bulk copy that reads here"};
constexpr uint32_t kReaders = 3 * kMaxWarps, kActors = kMbarrier * kMaxWarps + kMaxMbarriers + 1;
constexpr uint32_t kHoldsMbarrier = UINT32_MAX;  // the tick of a write that only mbarrier.inval may follow

inline uint32_t actor(Kind kind, uint32_t index) { return kind * kMaxWarps + index; }
inline bool is_async(uint32_t actor) { return actor >= kMaxWarps; }

// What an actor knows to have happened: ticks of all.
struct Clock : std::array<uint32_t, kActors> {
  void join(const Clock& other) {
    for (uint32_t i = 0; i < kActors; ++i) (*this)[i] = std::max((*this)[i], other[i]);
  }
};

// An access to shared memory: by whom, at which tick of its clock, knowing what.
struct Access {
  const Clock& known;
  uint32_t actor, tick;
};

// The last accesses to shared memory: writes by 4-byte word, reads by 16-byte chunk. They fail where there is a race.
class Shadow {
 public:
  explicit Shadow(uint32_t bytes) : writes_(bytes / 4), reads_(bytes / 16) {}

  void read(uint32_t begin, uint32_t bytes, const Access& access) {
    for (uint32_t word = begin / 4; word <= (begin + bytes - 1) / 4; ++word) {
      check_written(writes_[word], access);
      reads_[word / 4][access.actor] = access.tick;
    }
  }

  void write(uint32_t begin, uint32_t bytes, const Access& access, bool checked = true) {
    for (uint32_t chunk = begin / 16; chunk <= (begin + bytes - 1) / 16; ++chunk)
      for (uint32_t i = 0; checked && i < kReaders; ++i)
        if (reads_[chunk][i] > access.known[i]) fail("a race with a %s", kReaderNames[i / kMaxWarps]);
    for (uint32_t word = begin / 4; word <= (begin + bytes - 1) / 4; ++word) {
      if (checked && writes_[word].tick) check_written(writes_[word], access);
      writes_[word] = {access.actor, access.tick};
    }
  }

  // Whether an ordinary store of another warp was the last here.
  bool written_by_other_warp(uint32_t begin, const Access& access) const {
    const Write& write = writes_[begin / 4];
    return write.tick && !is_async(write.actor) && write.actor != access.actor;
  }

 private:
  struct Write {
    uint32_t actor = 0, tick = 0;  // tick 0: never written
  };

  void check_written(const Write& write, const Access& access) const {
    if (!write.tick) fail("shared memory that nobody has written");
    if (write.tick == kHoldsMbarrier) fail("shared memory that holds an mbarrier");
    if (write.tick > access.known[write.actor])
      fail("a race with a %s", is_async(write.actor) ? "bulk copy that writes here" : "store of another warp");
    if (is_async(access.actor) && !is_async(write.actor) && write.tick > access.known[actor(kShown, write.actor)])
      fail("an ordinary store without fence.proxy.async before the async proxy");
  }

  std::vector<Write> writes_;
  std::vector<std::array<uint32_t, kReaders>> reads_;
};

}  // namespace hopper
