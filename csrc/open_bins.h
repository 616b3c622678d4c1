// Bins by remaining room.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <queue>
#include <utility>
#include <vector>

namespace mmpack {

// Open bins by token room, each with its patch room. A segment tree over token room stores the
// largest patch room below each node, so one descent finds the tightest bin for a sample.
class OpenBins {
 public:
  explicit OpenBins(std::int64_t token_capacity)
      : step_(token_capacity / kMaxLeaves + 1),
        num_leaves_(std::bit_ceil(static_cast<std::uint64_t>(token_capacity / step_ + 2))),
        most_patch_room_(2 * num_leaves_, kNone),
        leaves_(num_leaves_) {}

  void push(std::int64_t bin, std::int64_t token_room, std::int64_t patch_room) {
    const std::uint64_t leaf = static_cast<std::uint64_t>(token_room / step_);
    leaves_[leaf].emplace(patch_room, -bin);
    update(leaf);
  }

  // Removes and returns the bin with the least token room >= tokens among those with patch room >=
  // patches (ties: most patch room, then oldest); -1 if there is none.
  std::int64_t pop_tightest(std::int64_t tokens, std::int64_t patches) {
    // If step_ > 1, rounding up skips bins in the sample's leaf: looser, but never too small.
    const std::uint64_t first = static_cast<std::uint64_t>((tokens + step_ - 1) / step_);
    const std::uint64_t leaf = first_leaf(1, 0, num_leaves_, first, patches);
    if (leaf == num_leaves_) return -1;
    const std::int64_t bin = -leaves_[leaf].top().second;
    leaves_[leaf].pop();
    update(leaf);
    return bin;
  }

 private:
  static constexpr std::int64_t kMaxLeaves = 1 << 20;
  static constexpr std::int64_t kNone = -1;

  void update(std::uint64_t leaf) {
    std::uint64_t node = leaf + num_leaves_;
    most_patch_room_[node] = leaves_[leaf].empty() ? kNone : leaves_[leaf].top().first;
    for (node /= 2; node >= 1; node /= 2) {
      most_patch_room_[node] = std::max(most_patch_room_[2 * node], most_patch_room_[2 * node + 1]);
    }
  }

  // First leaf >= first in [begin, end) under node with enough patch room, else num_leaves_.
  std::uint64_t first_leaf(std::uint64_t node, std::uint64_t begin, std::uint64_t end,
                           std::uint64_t first, std::int64_t patches) const {
    if (end <= first || most_patch_room_[node] < patches) return num_leaves_;
    if (end - begin == 1) return begin;
    const std::uint64_t middle = (begin + end) / 2;
    const std::uint64_t left = first_leaf(2 * node, begin, middle, first, patches);
    return left != num_leaves_ ? left : first_leaf(2 * node + 1, middle, end, first, patches);
  }

  std::int64_t step_;
  std::uint64_t num_leaves_;
  std::vector<std::int64_t> most_patch_room_;  // node 1 is the root, node num_leaves_ + i is leaf i
  std::vector<std::priority_queue<std::pair<std::int64_t, std::int64_t>>> leaves_;
};

}  // namespace mmpack
