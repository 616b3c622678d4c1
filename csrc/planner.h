// Bins from sizes: which samples share a pack.
//
// Best-fit-decreasing over one capacity (tokens) or two (tokens and vision patches); balance.h adds
// a cost to be spread evenly. The result is a pure function of the arguments, equal on every
// machine.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "random.h"

namespace mmpack {

// What bins may hold. tokens (N,) and patches (N,) or empty; 0 <= tokens[i] <= token_capacity,
// likewise patches.
struct Sizes {
  std::span<const std::int64_t> tokens;
  std::int64_t token_capacity;
  std::span<const std::int64_t> patches;
  std::int64_t patch_capacity;

  std::int64_t patches_of(std::int64_t i) const { return patches.empty() ? 0 : patches[i]; }
  // The larger share of the two capacities.
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

// Sample numbers shuffled; the order all ties are broken in.
std::vector<std::int64_t> shuffled_samples(std::size_t num_samples, Random& random);

// Sorts `order` by size, largest first, and fills bins in it. O(N log C), C = min(token_capacity,
// 2^20). The order given decides between samples of equal sizes only, so the number of bins and
// what room each has left do not depend on it.
Bins best_fit_decreasing(const Sizes& sizes, std::vector<std::int64_t>& order);

// The bins in random order, their samples in the order given.
Plan to_plan(const Bins& bins, const std::vector<std::int64_t>& order, Random& random);

// Both for a seed, which decides the order of samples of equal size and the order of the bins.
Plan best_fit_decreasing(const Sizes& sizes, std::uint64_t seed);

}  // namespace mmpack
