// The initial bins for the local search: their number, and a bin for each sample (balance.h).
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "bin_state.h"
#include "levels.h"

namespace mmpack {

// Unused capacity that gives the construction and the search freedom, as shares of the token
// capacity.
struct Slack {
  double least;  // unused if every costly sample's bin can be filled
  double most;   // the most that may be unused
};

// The first was chosen on 155,556 real lengths with 4,096 tokens per bin, the hardest of 4,096,
// 8,192 and 32,768; 0.002 takes nearly twice as long. The others are for costs that do not follow
// size.
inline constexpr std::array<Slack, 4> kSlacks{
    {{0.0026, 0.005}, {0.01, 0.03}, {0.02, 0.03}, {0.029, 0.03}}};
inline constexpr double kCostly =
    0.25;  // costly samples: excess cost share / size share is at least this
inline constexpr double kLong =
    0.06;                           // cheap samples above this share of a bin are placed early
inline constexpr int kJitter = 64;  // of 1024, in the order of construction, so epochs differ
inline constexpr std::size_t kAhead =
    16;  // samples prefetched ahead; they are scattered in memory
inline constexpr std::size_t kAngles = 3;  // only tokens, both equally, only cost
inline constexpr int kSqueezes = 200;      // swaps tried to make room for a sample
inline constexpr int kPicks = 12;          // samples of a bin tried in a swap
inline constexpr int kCandidates = 48;     // samples each of them is tried with

class Construction : protected BinState {
 protected:
  // Chooses the number of bins and puts every sample into one.
  Construction(const Sizes& sizes, std::span<const std::int64_t> costs, std::uint64_t seed,
               const Slack& slack)
      : BinState(sizes, seed) {
    order_ = shuffled_samples(items_.size(), random_);
    by_tokens_ = order_;
    const Bins tight = best_fit_decreasing(sizes, by_tokens_);  // sorts them by size
    std::reverse(by_tokens_.begin(), by_tokens_.end());
    const double total = double(std::accumulate(costs.begin(), costs.end(), std::int64_t{0}));
    const double cheap = cheap_density(costs);
    num_bins_ = count_bins(costs, total, cheap, tight.num_bins, slack);

    const double scale = double(kMean) * double(num_bins_) / total;
    for (std::size_t i = 0; i < items_.size(); ++i) {
      items_[i] = {sizes.tokens[i], sizes.patches_of(i), std::llround(double(costs[i]) * scale)};
    }
    const bool fits = construct_by_kind(cheap * scale) || construct_by_need(false, false) ||
                      construct_by_need(true, false) || construct_by_need(false, true);
    if (!fits) adopt(tight);
  }

  std::vector<std::int64_t> order_;      // shuffled samples
  std::vector<std::int64_t> by_tokens_;  // smallest first; with patches, by the larger share

 private:
  // Cost of a cheap token: the 10th percentile over the samples.
  double cheap_density(std::span<const std::int64_t> costs) const {
    std::vector<double> densities;
    densities.reserve(costs.size());
    for (std::size_t i = 0; i < costs.size(); ++i) {
      if (sizes_.tokens[i]) densities.push_back(double(costs[i]) / double(sizes_.tokens[i]));
    }
    if (densities.empty()) return 0.0;
    const auto tenth = densities.begin() + densities.size() / 10;
    std::nth_element(densities.begin(), tenth, densities.end());
    return *tenth;
  }

  // A sample that is very costly for its size makes a bin costlier than the mean even if it is
  // filled with cheap tokens, so its bin must stay partly empty. That unused room is added to the
  // tokens.
  std::int64_t count_bins(std::span<const std::int64_t> costs, double total_cost, double cheap,
                          std::int64_t fewest, const Slack& slack) const {
    const auto& tokens = sizes_.tokens;
    const double capacity = double(sizes_.token_capacity);
    const double total = double(std::accumulate(tokens.begin(), tokens.end(), std::int64_t{0}));
    const auto most = static_cast<std::int64_t>(
        std::min(total / (1 - slack.most) / capacity, double(tokens.size())));
    std::int64_t bins = fewest;
    for (int round = 0; round < 8 && bins < most;
         ++round) {  // more bins lower the mean, so more room is unused
      const double mean = total_cost / double(bins);
      double unused = 0;
      for (std::size_t i = 0; i < tokens.size(); ++i) {
        const double room = capacity - double(tokens[i]);
        const double beside = std::max(0.0, mean - double(costs[i]));
        if (room * cheap > beside) unused += std::floor(room - beside / cheap);
      }
      const double needed = std::ceil((total + unused) / capacity / (1 - slack.least));
      const auto next = needed < double(most) ? static_cast<std::int64_t>(needed) : most;
      if (next <= bins) break;
      bins = next;
    }
    return bins;
  }

  // False if a sample did not fit or a bin stayed empty.
  bool construct_by_kind(double cheap) {
    bins_.assign(num_bins_, {});
    std::vector<double> above(items_.size());  // excess cost as a share of an average bin's
    double total = 0;
    for (std::size_t i = 0; i < items_.size(); ++i) {
      above[i] =
          std::max(0.0, double(items_[i].cost) - std::floor(cheap * double(items_[i].tokens)));
      total += above[i];
    }
    for (double& share : above) share = total > 0 ? share * double(num_bins_) / total : 0.0;
    const auto is_costly = [&](std::size_t i) { return above[i] >= kCostly * share(items_[i]); };

    std::vector<std::pair<double, std::int64_t>> largest_first;
    largest_first.reserve(items_.size());
    for (std::size_t i = 0; i < items_.size(); ++i) {
      const double room = share(items_[i]);
      double size = std::max(room, above[i]) * double(1024 + random_.below(kJitter));
      if (room < kLong && !is_costly(i)) size /= 1 << 20;  // placed last
      largest_first.emplace_back(size, std::int64_t(i));
    }
    std::sort(largest_first.begin(), largest_first.end(), std::greater<>());

    Levels by_load(num_bins_), by_above(num_bins_);
    std::vector<double> bin_above(num_bins_, 0.0);
    const auto load_of = [&](std::int64_t b) { return load(bins_[b]); };
    const auto above_of = [&](std::int64_t b) { return bin_above[b]; };
    const auto room = [&](std::int64_t b) { return sizes_.token_capacity - bins_[b].tokens; };
    for (std::size_t n = 0; n < largest_first.size(); ++n) {
      const std::int64_t i = largest_first[n].second;
      const std::int64_t next = largest_first[std::min(n + kAhead, items_.size() - 1)].second;
      __builtin_prefetch(&items_[next]);
      __builtin_prefetch(&above[next]);
      __builtin_prefetch(&bin_of_[next]);
      const Item& item = items_[i];
      const auto takes = [&](std::int64_t b) { return fits(bins_[b], item); };
      std::int64_t bin = is_costly(i) ? by_above.find(item.tokens, above_of, room, takes) : -1;
      if (bin < 0) bin = by_load.find(item.tokens, load_of, room, takes);
      if (bin < 0) return false;
      put(bin, i);
      bin_above[bin] += above[i];
    }
    return none_is_empty();
  }

  // Largest first, by the larger of size and cost or by their sum, each into the bin with the most
  // left of what it needs: room and cost, weighted as in the sample. Samples that do not fit come
  // last, if bins may be rearranged for them.
  bool construct_by_need(bool by_sum, bool rearranges) {
    std::vector<std::int64_t> left;
    bins_.assign(num_bins_, {});
    std::vector<std::pair<double, std::int64_t>> largest_first;
    largest_first.reserve(items_.size());
    for (std::size_t i = 0; i < items_.size(); ++i) {
      const double room = share(items_[i]), cost = double(items_[i].cost) / double(kMean);
      const double size = by_sum ? room + cost : std::max(room, cost);
      largest_first.emplace_back(size * double(1024 + random_.below(kJitter)), std::int64_t(i));
    }
    std::sort(largest_first.begin(), largest_first.end(), std::greater<>());

    std::vector<Levels> levels(kAngles, Levels(num_bins_));
    const auto room = [&](std::int64_t b) { return sizes_.token_capacity - bins_[b].tokens; };
    for (std::size_t n = 0; n < largest_first.size(); ++n) {
      const std::int64_t i = largest_first[n].second;
      const std::int64_t next = largest_first[std::min(n + kAhead, items_.size() - 1)].second;
      __builtin_prefetch(&items_[next]);
      __builtin_prefetch(&bin_of_[next]);
      const Item& item = items_[i];
      const double size_share = share(item), cost = double(item.cost) / double(kMean);
      const double part = size_share + cost > 0 ? cost / (size_share + cost) : 0.0;
      const auto angle = static_cast<std::size_t>(part * double(kAngles - 1) + 0.5);
      const double weight = double(angle) / double(kAngles - 1);
      const auto level = [&](std::int64_t b) {
        return (1 - weight) * share(bins_[b]) + weight * (double(bins_[b].cost) / double(kMean));
      };
      const auto takes = [&](std::int64_t b) { return fits(bins_[b], item); };
      const std::int64_t bin = levels[angle].find(item.tokens, level, room, takes);
      if (bin < 0) {
        if (!rearranges) return false;
        left.push_back(i);
        continue;
      }
      put(bin, i);
    }
    return std::all_of(left.begin(), left.end(), [&](std::int64_t i) { return squeeze_in(i); }) &&
           none_is_empty();
  }

  // Puts a sample into a bin with much room, after making more room by swaps with other bins. False
  // if kSqueezes swaps are not enough.
  bool squeeze_in(std::int64_t sample) {
    const Item& item = items_[sample];
    const auto room = [&](std::int64_t b) { return sizes_.token_capacity - bins_[b].tokens; };
    const auto any_bin = [&] { return static_cast<std::int64_t>(random_.below(num_bins_)); };
    std::int64_t bin = any_bin();
    for (int n = 0; n < kCandidates; ++n) {
      const std::int64_t other = any_bin();
      if (room(other) > room(bin)) bin = other;
    }
    for (int n = 0; n < kSqueezes && !fits(bins_[bin], item); ++n) {
      const std::int64_t other = any_bin();
      if (other == bin || bins_[bin].samples.empty()) continue;
      const Bin &a = bins_[bin], &b = bins_[other];
      std::int64_t most = 0;
      std::size_t give = 0, get = 0;
      for (int pick = 0; pick < kPicks; ++pick) {
        const std::size_t x = random_.below(a.samples.size());
        const Item& mine = items_[a.samples[x]];
        for (std::size_t y = 0; y < b.samples.size(); ++y) {
          const Item& theirs = items_[b.samples[y]];
          const std::int64_t won = mine.tokens - theirs.tokens;
          const std::int64_t patches = mine.patches - theirs.patches;
          if (won <= most || won > room(other) || b.patches + patches > sizes_.patch_capacity ||
              a.patches - patches > sizes_.patch_capacity) {
            continue;
          }
          most = won;
          give = x;
          get = y;
        }
      }
      if (!most) continue;
      const std::int64_t given = a.samples[give], got = b.samples[get];
      take(bin, give);
      take(other, get);
      put(bin, got);
      put(other, given);
    }
    if (!fits(bins_[bin], item)) return false;
    put(bin, sample);
    return true;
  }

  // The bins of best-fit-decreasing; each additional bin gets a sample from a bin with two or more.
  void adopt(const Bins& tight) {
    bins_.assign(num_bins_, {});
    for (const std::int64_t i : order_) put(tight.bin_of[i], i);
    std::int64_t from = 0;
    for (std::int64_t b = tight.num_bins; b < num_bins_; ++b) {
      while (bins_[from].samples.size() < 2) ++from;
      const std::int64_t sample = bins_[from].samples.back();
      take(from, bins_[from].samples.size() - 1);
      put(b, sample);
    }
  }
};

}  // namespace mmpack
