// Bins from sizes: which samples share a pack.
//
// Best-fit-decreasing over one capacity (tokens) or two (tokens and vision patches).
// The result is a pure function of the arguments, equal on every machine.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace mmpack {

// Samples of bin b: sample_index[bin_offsets[b] : bin_offsets[b + 1]].
struct Plan {
  std::vector<std::int64_t> sample_index;
  std::vector<std::int64_t> bin_offsets;
};

// tokens (N,) and patches (N,) or empty; 0 <= tokens[i] <= token_capacity, likewise patches.
// seed decides the order of samples of equal size and the order of the bins.
// O(N log C), C = min(token_capacity, 2^20).
Plan best_fit_decreasing(std::span<const std::int64_t> tokens, std::int64_t token_capacity,
                         std::span<const std::int64_t> patches, std::int64_t patch_capacity,
                         std::uint64_t seed);

}  // namespace mmpack
