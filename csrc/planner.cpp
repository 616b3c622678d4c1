#include "planner.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <queue>
#include <utility>

namespace mmpack {
namespace {

// splitmix64 (Steele, Lea, Flood 2014): fixed here because std::shuffle differs between libraries.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  // Uniform in [0, n), n >= 1; the bias of the remainder is below n / 2^64.
  std::uint64_t below(std::uint64_t n) {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return (z ^ (z >> 31)) % n;
  }

  void shuffle(std::vector<std::int64_t>& values) {
    for (std::size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[below(i)]);
  }

 private:
  std::uint64_t state_;
};

// Open bins by their token room, each with its patch room. A segment tree over token room holds
// the largest patch room below every node, so the tightest bin that takes a sample is one descent.
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

  // Takes out the bin with the least token room >= tokens among those with patch room >= patches
  // (ties: most patch room, then oldest); -1 if there is none.
  std::int64_t pop_tightest(std::int64_t tokens, std::int64_t patches) {
    // Rounding up skips bins that share the sample's leaf when step_ > 1: looser, never too small.
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

}  // namespace

Plan best_fit_decreasing(std::span<const std::int64_t> tokens, std::int64_t token_capacity,
                         std::span<const std::int64_t> patches, std::int64_t patch_capacity,
                         std::uint64_t seed) {
  const std::size_t num_samples = tokens.size();
  const auto patches_of = [&](std::int64_t i) { return patches.empty() ? 0 : patches[i]; };
  if (patches.empty()) patch_capacity = 0;

  Random random(seed);
  std::vector<std::int64_t> order(num_samples);
  std::iota(order.begin(), order.end(), std::int64_t{0});
  random.shuffle(order);

  // Size of a sample: the larger share of the two capacities.
  std::vector<double> size(num_samples);
  for (std::size_t i = 0; i < num_samples; ++i) {
    const double token_share = token_capacity ? double(tokens[i]) / double(token_capacity) : 0.0;
    const double patch_share = patch_capacity ? double(patches_of(i)) / double(patch_capacity) : 0.0;
    size[i] = std::max(token_share, patch_share);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int64_t a, std::int64_t b) { return size[a] > size[b]; });

  OpenBins open(token_capacity);
  std::vector<std::int64_t> bin_of(num_samples), token_room, patch_room;
  for (const std::int64_t i : order) {
    std::int64_t bin = open.pop_tightest(tokens[i], patches_of(i));
    if (bin < 0) {
      bin = static_cast<std::int64_t>(token_room.size());
      token_room.push_back(token_capacity);
      patch_room.push_back(patch_capacity);
    }
    bin_of[i] = bin;
    token_room[bin] -= tokens[i];
    patch_room[bin] -= patches_of(i);
    open.push(bin, token_room[bin], patch_room[bin]);
  }

  // Shuffled bins: best-fit-decreasing fills them from the largest samples to the smallest.
  const std::size_t num_bins = token_room.size();
  std::vector<std::int64_t> bins(num_bins);
  std::iota(bins.begin(), bins.end(), std::int64_t{0});
  random.shuffle(bins);
  std::vector<std::int64_t> place(num_bins), count(num_bins, 0);
  for (std::size_t p = 0; p < num_bins; ++p) place[bins[p]] = static_cast<std::int64_t>(p);

  Plan plan;
  plan.bin_offsets.assign(num_bins + 1, 0);
  plan.sample_index.resize(num_samples);
  for (const std::int64_t i : order) ++plan.bin_offsets[place[bin_of[i]] + 1];
  std::partial_sum(plan.bin_offsets.begin(), plan.bin_offsets.end(), plan.bin_offsets.begin());
  for (const std::int64_t i : order) {
    const std::int64_t p = place[bin_of[i]];
    plan.sample_index[plan.bin_offsets[p] + count[p]++] = i;
  }
  return plan;
}

}  // namespace mmpack
