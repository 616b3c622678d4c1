#include "planner.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "open_bins.h"

namespace mmpack {
namespace {

constexpr std::size_t kAhead = 16;  // samples prefetched ahead; they are scattered in memory

}  // namespace

double Sizes::share_of(std::int64_t i) const {
  const double tokens_share = token_capacity ? double(tokens[i]) / double(token_capacity) : 0.0;
  const double patch_share = patch_capacity ? double(patches_of(i)) / double(patch_capacity) : 0.0;
  return std::max(tokens_share, patch_share);
}

std::vector<std::int64_t> shuffled_samples(std::size_t num_samples, Random& random) {
  std::vector<std::int64_t> order(num_samples);
  std::iota(order.begin(), order.end(), std::int64_t{0});
  random.shuffle(order);
  return order;
}

Bins best_fit_decreasing(const Sizes& sizes, std::vector<std::int64_t>& order) {
  const std::size_t num_samples = sizes.tokens.size();
  std::vector<std::pair<double, std::int64_t>> by_share(num_samples);
  for (std::size_t n = 0; n < num_samples; ++n) by_share[n] = {sizes.share_of(order[n]), order[n]};
  std::stable_sort(by_share.begin(), by_share.end(), [&](const auto& a, const auto& b) {
    if (a.first != b.first) return a.first > b.first;
    if (sizes.patches.empty()) return false;
    const std::int64_t tokens_a = sizes.tokens[a.second], tokens_b = sizes.tokens[b.second];
    if (tokens_a != tokens_b) return tokens_a > tokens_b;
    return sizes.patches[a.second] > sizes.patches[b.second];
  });
  for (std::size_t n = 0; n < num_samples; ++n) order[n] = by_share[n].second;

  OpenBins open(sizes.token_capacity);
  Bins bins{std::vector<std::int64_t>(num_samples), 0};
  std::vector<std::int64_t> token_room, patch_room;
  for (std::size_t n = 0; n < num_samples; ++n) {
    const std::int64_t i = order[n];
    const std::int64_t next = order[std::min(n + kAhead, num_samples - 1)];
    __builtin_prefetch(&sizes.tokens[next]);
    __builtin_prefetch(&bins.bin_of[next]);
    std::int64_t bin = open.pop_tightest(sizes.tokens[i], sizes.patches_of(i));
    if (bin < 0) {
      bin = bins.num_bins++;
      token_room.push_back(sizes.token_capacity);
      patch_room.push_back(sizes.patch_capacity);
    }
    bins.bin_of[i] = bin;
    token_room[bin] -= sizes.tokens[i];
    patch_room[bin] -= sizes.patches_of(i);
    open.push(bin, token_room[bin], patch_room[bin]);
  }
  return bins;
}

Plan to_plan(const Bins& bins, const std::vector<std::int64_t>& order, Random& random) {
  // Bins are filled from the largest samples to the smallest; training needs them mixed.
  std::vector<std::int64_t> shuffled(bins.num_bins);
  std::iota(shuffled.begin(), shuffled.end(), std::int64_t{0});
  random.shuffle(shuffled);
  std::vector<std::int64_t> place(bins.num_bins), count(bins.num_bins, 0);
  for (std::int64_t p = 0; p < bins.num_bins; ++p) place[shuffled[p]] = p;

  Plan plan;
  plan.bin_offsets.assign(bins.num_bins + 1, 0);
  plan.sample_index.resize(order.size());
  for (const std::int64_t bin : bins.bin_of) ++plan.bin_offsets[place[bin] + 1];
  std::partial_sum(plan.bin_offsets.begin(), plan.bin_offsets.end(), plan.bin_offsets.begin());
  for (const std::int64_t i : order) {
    const std::int64_t p = place[bins.bin_of[i]];
    plan.sample_index[plan.bin_offsets[p] + count[p]++] = i;
  }
  return plan;
}

Plan best_fit_decreasing(const Sizes& sizes, std::uint64_t seed) {
  Random random(seed);
  std::vector<std::int64_t> order = shuffled_samples(sizes.tokens.size(), random);
  const Bins bins = best_fit_decreasing(sizes, order);
  return to_plan(bins, order, random);
}

}  // namespace mmpack
