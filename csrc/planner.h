// Bins from sizes: which samples share a pack.
//
// Best-fit-decreasing over one capacity (tokens) or two (tokens and vision patches); balance.h adds
// a cost to be balanced. The result depends only on the arguments and is equal on every machine.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "random.h"

namespace mmpack {

// Sizes of samples and capacities of bins. tokens (N,); patches (N,) or empty; 0 <= tokens[i] <=
// token_capacity, likewise patches.
struct Sizes {
  std::span<const std::int64_t> tokens;
  std::int64_t token_capacity;
  std::span<const std::int64_t> patches;
  std::int64_t patch_capacity;

  std::int64_t patches_of(std::int64_t i) const { return patches.empty() ? 0 : patches[i]; }
  // The larger of sample i's shares of the two capacities.
  double share_of(std::int64_t i) const;
};

// bin_of[i] in [0, num_bins) is the bin of sample i.
struct Bins {
  std::vector<std::int64_t> bin_of;
  std::int64_t num_bins = 0;
};

// Samples of bin b: sample_index[bin_offsets[b] : bin_offsets[b + 1]].
struct Plan {
  std::vector<std::int64_t> sample_index;
  std::vector<std::int64_t> bin_offsets;
};

// Shuffled sample numbers, the order in which all ties are broken.
std::vector<std::int64_t> shuffled_samples(std::size_t num_samples, Random& random);

// Sorts `order` by size, largest first, and fills bins in this order. O(N log C), C =
// min(token_capacity, 2^20). The given order only decides between samples of equal size, so the
// number of bins and their remaining room do not depend on it.
Bins best_fit_decreasing(const Sizes& sizes, std::vector<std::int64_t>& order);

// The bins in random order, their samples in the given order.
Plan to_plan(const Bins& bins, const std::vector<std::int64_t>& order, Random& random);

// Both steps, with a seed for the order of samples of equal size and the order of the bins.
Plan best_fit_decreasing(const Sizes& sizes, std::uint64_t seed);

}  // namespace mmpack
