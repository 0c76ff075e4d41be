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

// What an actor does at a tick of its clock. At tick 0 it has done nothing.
struct Event {
  uint32_t actor = 0, tick = 0;
};

// What somebody knows to have happened: a tick of each actor.
struct Clock {
  std::array<uint32_t, kActors> ticks{};

  bool knows(const Event& event) const { return ticks[event.actor] >= event.tick; }
  void join(const Clock& other) {
    for (uint32_t i = 0; i < kActors; ++i) ticks[i] = std::max(ticks[i], other.ticks[i]);
  }
};

// The last accesses to shared memory: writes by 4-byte word, reads by 16-byte chunk. `known`: to whoever makes one.
class Shadow {
 public:
  explicit Shadow(uint32_t bytes) : writes_(bytes / 4), reads_(bytes / 16) {}

  void read(uint32_t begin, uint32_t bytes, Event event, const Clock& known) {
    for (uint32_t word = begin / 4; word <= (begin + bytes - 1) / 4; ++word) {
      check_written(writes_[word], event, known);
      reads_[word / 4][event.actor] = event.tick;
    }
  }

  void write(uint32_t begin, uint32_t bytes, Event event, const Clock& known, bool checked = true) {
    for (uint32_t chunk = begin / 16; chunk <= (begin + bytes - 1) / 16; ++chunk)
      for (uint32_t i = 0; checked && i < kReaders; ++i)
        if (!known.knows({i, reads_[chunk][i]})) fail("a race with a %s", kReaderNames[i / kMaxWarps]);
    for (uint32_t word = begin / 4; word <= (begin + bytes - 1) / 4; ++word) {
      if (checked && writes_[word].tick) check_written(writes_[word], event, known);
      writes_[word] = event;
    }
  }

  // Whether an ordinary store of another warp was the last here.
  bool written_by_other_warp(uint32_t begin, uint32_t warp) const {
    const Event& write = writes_[begin / 4];
    return write.tick && !is_async(write.actor) && write.actor != actor(kWarp, warp);
  }

 private:
  void check_written(const Event& write, const Event& event, const Clock& known) const {
    if (!write.tick) fail("shared memory that nobody has written");
    if (write.tick == kHoldsMbarrier) fail("shared memory that holds an mbarrier");
    if (!known.knows(write))
      fail("a race with a %s", is_async(write.actor) ? "bulk copy that writes here" : "store of another warp");
    if (is_async(event.actor) && !is_async(write.actor) && !known.knows({actor(kShown, write.actor), write.tick}))
      fail("an ordinary store without fence.proxy.async before the async proxy");
  }

  std::vector<Event> writes_;
  std::vector<std::array<uint32_t, kReaders>> reads_;
};

}  // namespace hopper
