#include "balance.h"

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <utility>

#include "construction.h"

namespace mmpack {
namespace {

constexpr std::int64_t kTolerance = kMean / 400;  // a bin's allowed cost above its target
constexpr std::int64_t kTried = 1 << 14;          // samples in a trial plan
constexpr double kEven = 0.04;  // allowed excess over the floor in a trial plan, of the mean
constexpr int kRounds = 16;
constexpr std::int64_t kWorthwhile = 20;   // a round must remove 1/20 of the excess
constexpr std::int64_t kFar = kMean / 40;  // cost above the floor of bins that continue
constexpr std::int64_t kFew = 10;          // at most 1/10 of the bins continue
constexpr int kSwaps = 8;                  // per bin and round
constexpr int kPartners = 6;               // bins with which a bin exchanges groups per round
constexpr std::uint32_t kPairs = 64;       // pairs of samples listed per bin; 400 find no more
constexpr std::size_t kGroup = 1 << 20;    // samples balanced at once; more do not fit a cache

// Zero, one or two samples of a bin, by position; first > second.
struct Group {
  std::int64_t tokens = 0, patches = 0, cost = 0;
  std::uint32_t count = 0, first = 0, second = 0;
};

class Balancer : private Construction {
 public:
  Balancer(const Sizes& sizes, std::span<const std::int64_t> costs, std::uint64_t seed,
           const Slack& slack)
      : Construction(sizes, costs, seed, slack) {}

  // The costliest bin's cost above max(mean, costliest sample), relative to the mean.
  double unevenness() const {
    std::int64_t most = 0, floor = kMean;
    for (const Bin& bin : bins_) {
      most = std::max(most, bin.cost);
      floor = std::max(floor, bin.costliest);
    }
    return double(most - floor) / double(kMean);
  }

  void search() {
    std::vector<std::int64_t> excess(num_bins_), by_excess(num_bins_);
    std::iota(by_excess.begin(), by_excess.end(), std::int64_t{0});
    if (!sizes_.patches.empty()) {
      std::stable_sort(by_tokens_.begin(), by_tokens_.end(), [&](std::int64_t a, std::int64_t b) {
        return items_[a].tokens < items_[b].tokens;
      });
    }
    std::int64_t before = std::numeric_limits<std::int64_t>::max(), floor = kMean;
    for (const Item& item : items_) floor = std::max(floor, item.cost);
    for (int round = 0; round < kRounds; ++round) {
      for (std::int64_t b = 0; b < num_bins_; ++b) excess[b] = bins_[b].excess();
      std::sort(by_excess.begin(), by_excess.end(), [&](std::int64_t a, std::int64_t b) {
        return excess[a] != excess[b] ? excess[a] < excess[b] : a < b;
      });
      std::int64_t too_much = 0;
      for (const std::int64_t e : excess) too_much += std::max<std::int64_t>(0, e - kTolerance);
      if (!too_much) return;
      // If a round gains little, only bins far above the floor continue, if they are few.
      const bool is_slow = too_much > before - before / kWorthwhile;
      const auto is_far = [&](std::int64_t b) { return bins_[b].cost > floor + kFar; };
      if (is_slow) {
        const std::int64_t num_far = std::count_if(by_excess.begin(), by_excess.end(), is_far);
        if (!num_far || num_far > num_bins_ / kFew) return;
      }
      offered_.clear();
      offered_tokens_.clear();
      for (std::size_t n = 0; n < by_tokens_.size(); ++n) {
        const std::int64_t i = by_tokens_[n];
        __builtin_prefetch(&bin_of_[by_tokens_[std::min(n + kAhead, by_tokens_.size() - 1)]]);
        if (excess[bin_of_[i]] >= -kTolerance) continue;
        offered_.emplace_back(items_[i].cost, i);
        offered_tokens_.push_back(items_[i].tokens);
      }
      const auto is_below = [&](std::int64_t b) { return excess[b] < 0; };
      const std::int64_t num_below = std::count_if(by_excess.begin(), by_excess.end(), is_below);
      before = std::min(before, too_much);
      for (std::int64_t n = num_bins_ - 1; n >= 0 && excess[by_excess[n]] > kTolerance; --n) {
        if (!is_slow || is_far(by_excess[n])) relieve(by_excess[n], by_excess, num_below);
      }
    }
  }

  Bins bins() const { return {bin_of_, num_bins_}; }
  Plan plan() { return to_plan(bins(), order_, random_); }

 private:
  // Lowers the excess of a bin as far as possible.
  void relieve(std::int64_t costly, const std::vector<std::int64_t>& by_excess,
               std::int64_t num_below) {
    for (int n = 0; n < kSwaps && bins_[costly].excess() > kTolerance; ++n) {
      if (!swap_one(costly) && n > 0) break;
    }
    bool is_listed = false;
    for (int n = 0; n < kPartners && bins_[costly].excess() > kTolerance; ++n) {
      const std::int64_t among = n % 2 || !num_below ? num_bins_ : num_below;
      const std::int64_t cheap = by_excess[random_.below(among)];
      if (cheap == costly || bins_[cheap].excess() >= bins_[costly].excess()) continue;
      if (!is_listed) list_groups(bins_[costly], mine_);
      is_listed = !exchange(costly, cheap);
    }
  }

  // Swaps a sample with one of about the same length from any bin below its target, choosing the
  // candidate that minimizes the larger excess of the two bins.
  bool swap_one(std::int64_t costly) {
    const Bin& a = bins_[costly];
    const std::int64_t reach = sizes_.token_capacity / 256 + 1;  // largest difference in tokens
    const std::int64_t room = sizes_.token_capacity - a.tokens;
    std::int64_t best = a.excess(), give = -1, get = -1;
    for (int n = 0; n < kPicks && best > kTolerance; ++n) {
      const std::int64_t i = a.samples[random_.below(a.samples.size())];
      const Item& mine = items_[i];
      if (mine.cost > kMean) continue;  // its bin's target is its own cost
      const auto begin = offered_tokens_.begin();
      const std::int64_t low =
          std::lower_bound(begin, offered_tokens_.end(), mine.tokens - reach) - begin;
      const std::int64_t high =
          std::upper_bound(begin, offered_tokens_.end(), mine.tokens + room) - begin;
      const std::int64_t count = std::min<std::int64_t>(high - low, kCandidates);
      const std::int64_t start = low + random_.below(high - low - count + 1);
      for (std::int64_t c = start; c < start + count && best > kTolerance; ++c) {
        const auto& [cost, j] = offered_[c];
        const std::int64_t left_a = a.cost + cost - mine.cost - a.target();
        if (cost >= mine.cost || left_a >= best) continue;
        const std::int64_t bin = bin_of_[j];
        const Bin& b = bins_[bin];
        const std::int64_t left = std::max(left_a, b.cost + mine.cost - cost - b.target());
        if (left >= best || bin == costly) continue;
        const Item& other = items_[j];
        if (b.tokens + mine.tokens - other.tokens > sizes_.token_capacity ||
            a.patches + other.patches - mine.patches > sizes_.patch_capacity ||
            b.patches + mine.patches - other.patches > sizes_.patch_capacity) {
          continue;
        }
        best = left;
        give = i;
        get = j;
      }
    }
    if (give < 0) return false;
    const std::int64_t cheap = bin_of_[get];
    for (const auto& [bin, sample] : {std::pair(costly, give), std::pair(cheap, get)}) {
      const auto& samples = bins_[bin].samples;
      take(bin, std::find(samples.begin(), samples.end(), sample) - samples.begin());
    }
    put(costly, get);
    put(cheap, give);
    return true;
  }

  // Exchanges the groups that minimize the larger excess of two bins; mine_ are the costly bin's.
  bool exchange(std::int64_t costly, std::int64_t cheap) {
    const Bin& a = bins_[costly];
    const Bin& b = bins_[cheap];
    list_groups(b, others_);
    std::sort(others_.begin(), others_.end(), [](const Group& x, const Group& y) {
      return x.tokens != y.tokens ? x.tokens < y.tokens : x.cost < y.cost;
    });
    const std::int64_t room_a = sizes_.token_capacity - a.tokens;
    const std::int64_t room_b = sizes_.token_capacity - b.tokens;
    std::int64_t best = a.excess();
    Group give, get;
    for (const Group& mine : mine_) {
      auto other = std::lower_bound(
          others_.begin(), others_.end(), mine.tokens - room_b,
          [](const Group& group, std::int64_t tokens) { return group.tokens < tokens; });
      for (; other != others_.end() && other->tokens <= mine.tokens + room_a; ++other) {
        const std::int64_t cost = other->cost - mine.cost;  // change of the costly bin
        const std::int64_t left = std::max(a.cost + cost - a.target(), b.cost - cost - b.target());
        if (left >= best) continue;
        const std::int64_t patches = other->patches - mine.patches;
        if (a.patches + patches > sizes_.patch_capacity ||
            b.patches - patches > sizes_.patch_capacity ||
            a.samples.size() + other->count == mine.count ||
            b.samples.size() + mine.count == other->count) {  // a bin keeps a sample
          continue;
        }
        best = left;
        give = mine;
        get = *other;
      }
      if (best <= kTolerance) break;
    }
    if (best == a.excess()) return false;
    const auto given = take_group(costly, give), got = take_group(cheap, get);
    for (std::uint32_t n = 0; n < give.count; ++n) put(cheap, given[n]);
    for (std::uint32_t n = 0; n < get.count; ++n) put(costly, got[n]);
    return true;
  }

  std::array<std::int64_t, 2> take_group(std::int64_t bin, const Group& group) {
    const auto& samples = bins_[bin].samples;
    std::array<std::int64_t, 2> taken{};
    const std::array<std::uint32_t, 2> places{group.first, group.second};
    for (std::uint32_t n = 0; n < group.count; ++n) {
      taken[n] = samples[places[n]];
      take(bin, places[n]);  // moves the last sample here; the second position is before the first
    }
    return taken;
  }

  // The empty group, each sample that does not cost more than a mean bin, and pairs of them: all,
  // or a random choice.
  void list_groups(const Bin& bin, std::vector<Group>& groups) {
    groups.assign(1, {});
    for (std::uint32_t place = 0; place < bin.samples.size(); ++place) {
      const Item& item = items_[bin.samples[place]];
      if (item.cost <= kMean) groups.push_back({item.tokens, item.patches, item.cost, 1, place, 0});
    }
    const auto end = static_cast<std::uint32_t>(groups.size());
    const auto add_pair = [&](std::uint32_t i, std::uint32_t j) {
      const Group x = groups[i], y = groups[j];
      groups.push_back(
          {x.tokens + y.tokens, x.patches + y.patches, x.cost + y.cost, 2, x.first, y.first});
    };
    if ((end - 1) * (end - 1) <= 2 * kPairs) {
      for (std::uint32_t i = 2; i < end; ++i) {
        for (std::uint32_t j = 1; j < i; ++j) add_pair(i, j);
      }
    } else {
      for (std::uint32_t n = 0; n < kPairs; ++n) {
        const auto i = static_cast<std::uint32_t>(2 + random_.below(end - 2));
        add_pair(i, static_cast<std::uint32_t>(1 + random_.below(i - 1)));
      }
    }
  }

  std::vector<std::pair<std::int64_t, std::int64_t>> offered_;  // (cost, sample), by tokens
  std::vector<std::int64_t> offered_tokens_;
  std::vector<Group> mine_, others_;
};

// The first slack with which a trial plan of kTried samples, spread over all samples, has even
// bins; if there is none, the most even one. Does not depend on the seed.
const Slack& choose_slack(const Sizes& sizes, std::span<const std::int64_t> costs) {
  const auto total = static_cast<std::int64_t>(costs.size());
  const std::int64_t step = (total + kTried - 1) / kTried;
  std::vector<std::int64_t> tokens, patches, some_costs;
  std::int64_t any_cost = 0;
  for (std::int64_t i = 0; i < total; i += step) {
    tokens.push_back(sizes.tokens[i]);
    if (!sizes.patches.empty()) patches.push_back(sizes.patches[i]);
    some_costs.push_back(costs[i]);
    any_cost |= costs[i];
  }
  if (!any_cost) return kSlacks[0];
  const Sizes some{tokens, sizes.token_capacity, patches, sizes.patch_capacity};
  const Slack* best = nullptr;
  double least = 0;
  for (const Slack& slack : kSlacks) {
    Balancer balancer(some, some_costs, 0, slack);
    balancer.search();
    const double uneven = balancer.unevenness();
    if (!best || uneven < least) {
      best = &slack;
      least = uneven;
    }
    if (uneven <= kEven) break;
  }
  return *best;
}

// Sample numbers in groups of equal size with similar costs and tokens: sorted by cost, then dealt
// round-robin. Does not depend on the seed, so a group has the same number of bins in every epoch.
std::vector<std::vector<std::int64_t>> alike_groups(const Sizes& sizes,
                                                    std::span<const std::int64_t> costs,
                                                    std::size_t num_groups) {
  struct Key {
    std::int64_t cost, tokens, sample;
    auto operator<=>(const Key&) const = default;
  };
  std::vector<Key> keys;
  keys.reserve(costs.size());
  for (std::size_t i = 0; i < costs.size(); ++i) {
    keys.push_back({costs[i], sizes.tokens[i], std::int64_t(i)});
  }
  std::sort(keys.begin(), keys.end());
  std::vector<std::vector<std::int64_t>> groups(num_groups);
  for (std::size_t n = 0; n < keys.size(); ++n) groups[n % num_groups].push_back(keys[n].sample);
  for (auto& group : groups) std::sort(group.begin(), group.end());  // to read memory in order
  return groups;
}

Bins bins_of_group(const Sizes& sizes, std::span<const std::int64_t> costs, std::uint64_t seed,
                   const Slack& slack) {
  if (std::all_of(costs.begin(), costs.end(), [](std::int64_t cost) { return !cost; })) {
    Random random(seed);
    std::vector<std::int64_t> order = shuffled_samples(costs.size(), random);
    return best_fit_decreasing(sizes, order);
  }
  Balancer balancer(sizes, costs, seed, slack);
  balancer.search();
  return balancer.bins();
}

}  // namespace

Plan balance(const Sizes& sizes, std::span<const std::int64_t> costs, std::uint64_t seed) {
  const Slack& slack = choose_slack(sizes, costs);
  const std::size_t num_groups = (costs.size() + kGroup - 1) / kGroup;
  if (num_groups < 2) {
    Balancer balancer(sizes, costs, seed, slack);
    balancer.search();
    return balancer.plan();
  }
  Random random(seed);
  Bins bins{std::vector<std::int64_t>(costs.size()), 0};
  for (const auto& group : alike_groups(sizes, costs, num_groups)) {
    std::vector<std::int64_t> tokens, patches, some_costs;
    for (const std::int64_t i : group) {
      tokens.push_back(sizes.tokens[i]);
      if (!sizes.patches.empty()) patches.push_back(sizes.patches[i]);
      some_costs.push_back(costs[i]);
    }
    const Sizes some{tokens, sizes.token_capacity, patches, sizes.patch_capacity};
    const Bins found = bins_of_group(some, some_costs, seed + bins.num_bins, slack);
    for (std::size_t n = 0; n < group.size(); ++n) {
      bins.bin_of[group[n]] = bins.num_bins + found.bin_of[n];
    }
    bins.num_bins += found.num_bins;
  }
  return to_plan(bins, shuffled_samples(costs.size(), random), random);
}

}  // namespace mmpack
