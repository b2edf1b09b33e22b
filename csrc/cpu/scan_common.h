// What the forward and the backward scan share: members of the team and their part of the work, and scratch memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/cells/cell.h"
#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "cpu/tile.h"

namespace fastrnn {
inline namespace CPU_CAPABILITY {

inline constexpr int kMaxDirections = 2;

// Hands out aligned pieces of one block; with a null base it only counts. Both uses are the same code, so the size that
// is asked for and the layout that is used can't differ.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class U>
  FASTRNN_INLINE U* take(int64_t count) {
    U* p = base_ == nullptr ? nullptr : reinterpret_cast<U*>(base_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(U)) + 63) / 64 * 64;
    return p;
  }
  FASTRNN_INLINE int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

struct Range {
  int64_t begin, end;
};

FASTRNN_INLINE Range share(int64_t count, int member, int members) {
  return {count * member / members, count * (member + 1) / members};
}

// A member's place in the team of one direction.
struct Place {
  int member = 0;
  int members = 1;
  bool shard_units = false;
  Barrier* barrier = nullptr;

  FASTRNN_INLINE void wait() const { barrier->wait(members); }
  // between the phases and steps of a scan: only members that share units need what the others have written
  FASTRNN_INLINE void wait_for_units() const {
    if (shard_units) wait();
  }
  FASTRNN_INLINE Range blocks(int64_t count) const {
    return shard_units ? share(count, member, members) : Range{0, count};
  }
  FASTRNN_INLINE Range rows(int64_t count) const {
    return shard_units ? Range{0, count} : share(count, member, members);
  }
};

// Runs work(direction, place) on the team that the plan asks for: two directions side by side where there are two
// members or more, else one after the other.
template <class Work>
void run_directions(const Scan& scan, const Work& work) {
  Barrier barriers[kMaxDirections];
  run_team(scan.plan.threads, [&](int member, int members) {
    const int side_by_side = std::min(members, scan.directions);
    const int of = member * side_by_side / members;  // the first of the directions that this member works on
    const Range team{(static_cast<int64_t>(of) * members + side_by_side - 1) / side_by_side,
                     (static_cast<int64_t>(of + 1) * members + side_by_side - 1) / side_by_side};
    Place place{static_cast<int>(member - team.begin), static_cast<int>(team.end - team.begin), scan.plan.shard_units,
                &barriers[of]};
    for (int d = of; d < scan.directions; d += side_by_side) work(d, place);
  });
}

// How a scan is entered, forward and backward alike: scratch memory for each direction, and one run of `Direction` for
// each on its team. A Direction has lay_out(scan, arena), a constructor from what is its own, and visit_steps().
template <class Direction, class Params>
struct ScanEntry {
  static int64_t scratch_bytes(const Scan& scan) {
    Arena arena(nullptr);
    for (int d = 0; d < scan.directions; ++d) Direction::lay_out(scan, arena);
    return arena.used();
  }

  static void run(const Scan& scan, const Params* params, void* memory) {
    Arena arena(memory);
    decltype(Direction::lay_out(scan, arena)) scratch[kMaxDirections];
    for (int d = 0; d < scan.directions; ++d) scratch[d] = Direction::lay_out(scan, arena);
    run_directions(scan,
                   [&](int d, const Place& place) { Direction(scan, params[d], scratch[d], place).visit_steps(); });
  }
};

// Calls f(block, the block after it) over a range, back and forth: on odd steps it begins with the weights that the
// cache still holds.
template <class F>
FASTRNN_INLINE void zigzag(Range range, int64_t step, const F& f) {
  if (step % 2 == 0) {
    for (int64_t b = range.begin; b < range.end; ++b) f(b, std::min(b + 1, range.end - 1));
  } else {
    for (int64_t b = range.end - 1; b >= range.begin; --b) f(b, std::max(b - 1, range.begin));
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace fastrnn
