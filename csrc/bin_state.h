// Bins under construction: their samples, sizes and costs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "planner.h"
#include "random.h"

namespace mmpack {

inline constexpr std::int64_t kMean = 1 << 24;  // the mean cost of a bin, after scaling

struct Bin {
  std::int64_t tokens = 0, patches = 0, cost = 0;
  std::int64_t costliest = 0;  // cost of its costliest sample
  std::vector<std::int64_t> samples;

  std::int64_t target() const { return std::max(kMean, costliest); }
  std::int64_t excess() const { return cost - target(); }
};

struct Item {
  std::int64_t tokens = 0, patches = 0, cost = 0;
};

class BinState {
 protected:
  BinState(const Sizes& sizes, std::uint64_t seed)
      : sizes_(sizes), random_(seed), items_(sizes.tokens.size()), bin_of_(sizes.tokens.size()) {}

  bool fits(const Bin& bin, const Item& item) const {
    return bin.tokens + item.tokens <= sizes_.token_capacity &&
           bin.patches + item.patches <= sizes_.patch_capacity;
  }

  void put(std::int64_t bin, std::int64_t sample) {
    Bin& b = bins_[bin];
    const Item& item = items_[sample];
    b.tokens += item.tokens;
    b.patches += item.patches;
    b.cost += item.cost;
    b.costliest = std::max(b.costliest, item.cost);
    b.samples.push_back(sample);
    bin_of_[sample] = bin;
  }

  void take(std::int64_t bin, std::size_t place) {
    Bin& b = bins_[bin];
    const Item& item = items_[b.samples[place]];
    b.tokens -= item.tokens;
    b.patches -= item.patches;
    b.cost -= item.cost;
    b.samples[place] = b.samples.back();
    b.samples.pop_back();
    if (item.cost == b.costliest) {
      b.costliest = 0;
      for (const std::int64_t i : b.samples) b.costliest = std::max(b.costliest, items_[i].cost);
    }
  }

  bool none_is_empty() const {
    return std::none_of(bins_.begin(), bins_.end(), [](const Bin& b) { return b.samples.empty(); });
  }

  double load(const Bin& bin) const {
    return std::max(double(bin.cost) / double(kMean), share(bin));
  }

  // The larger of a bin's or sample's shares of the two capacities.
  template <typename Sized>
  double share(const Sized& sized) const {
    double most = 0;
    if (sizes_.token_capacity) most = double(sized.tokens) / double(sizes_.token_capacity);
    if (sizes_.patch_capacity)
      most = std::max(most, double(sized.patches) / double(sizes_.patch_capacity));
    return most;
  }

  const Sizes& sizes_;
  Random random_;
  std::vector<Item> items_;  // one per sample
  std::vector<std::int64_t> bin_of_;
  std::int64_t num_bins_ = 0;
  std::vector<Bin> bins_;
};

}  // namespace mmpack
