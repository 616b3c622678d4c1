#include "balance.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>

#include "levels.h"

namespace mmpack {
namespace {

constexpr std::int64_t kMean = 1 << 24;           // costs are scaled to this mean of a bin
constexpr std::int64_t kTolerance = kMean / 400;  // of a bin's cost above its target

// Room for the construction and the search to move in, as shares of the room for tokens.
struct Slack {
  double least;  // unused where every costly sample's bin can be filled up
  double most;   // unused at all
};

// The first was chosen on 155,556 real lengths at 4,096 tokens a bin, the hardest of 4,096, 8,192 and
// 32,768; 0.002 takes nearly twice as long. The others are for costs that do not follow size.
constexpr std::array<Slack, 4> kSlacks{{{0.0026, 0.005}, {0.01, 0.03}, {0.02, 0.03}, {0.029, 0.03}}};
constexpr std::int64_t kTried = 1 << 14;  // samples that decide which
constexpr double kEven = 0.04;            // of the mean: bins may be that much above the floor

constexpr double kCostly = 0.25;  // share of the spread cost over share of the room: from here
constexpr double kLong = 0.06;  // share of the room from which a cheap sample is placed early
constexpr int kJitter = 64;     // of 1024, in the order of construction: epochs differ
constexpr std::size_t kAhead = 16;  // samples of which memory is asked early; they lie anywhere
constexpr int kRounds = 16;
constexpr std::size_t kAngles = 3;  // all tokens, both alike, all cost
constexpr std::int64_t kWorthwhile = 20;  // a round takes away one in so many of what is too much
constexpr int kSqueezes = 200;              // swaps tried to make room for a sample
constexpr std::int64_t kFar = kMean / 40;  // above the floor
constexpr std::int64_t kFew = 10;          // one bin in so many
constexpr int kSwaps = 8;                 // for a bin in a round
constexpr int kPicks = 12;                // samples of a bin that are tried in a swap
constexpr int kCandidates = 48;           // samples each of them is tried with
constexpr int kPartners = 6;              // bins a bin exchanges groups with in a round
constexpr std::uint32_t kPairs = 64;      // of samples, listed in a bin; 400 find no more

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

// No, one or two samples of a bin, by their places; first > second.
struct Group {
  std::int64_t tokens = 0, patches = 0, cost = 0;
  std::uint32_t count = 0, first = 0, second = 0;
};

class Balancer {
 public:
  Balancer(const Sizes& sizes, std::span<const std::int64_t> costs, std::uint64_t seed,
           const Slack& slack)
      : sizes_(sizes), random_(seed), items_(sizes.tokens.size()), bin_of_(sizes.tokens.size()) {
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

  // What the costliest bin costs above max(mean, the costliest sample), in means.
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
      std::stable_sort(
          by_tokens_.begin(), by_tokens_.end(),
          [&](std::int64_t a, std::int64_t b) { return items_[a].tokens < items_[b].tokens; });
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
      // Where little is won, only the few bins go on that are far above all others.
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

  Plan plan() { return to_plan({bin_of_, num_bins_}, order_, random_); }

 private:
  // Cost of a cheap token: the tenth percentile over the samples.
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

  // A sample that is costly for its size would make a full bin costlier than the mean even with cheap
  // tokens beside it, so its bin must stay partly empty: that room comes on top of the tokens'.
  std::int64_t count_bins(std::span<const std::int64_t> costs, double total_cost, double cheap,
                          std::int64_t fewest, const Slack& slack) const {
    const auto& tokens = sizes_.tokens;
    const double capacity = double(sizes_.token_capacity);
    const double total = double(std::accumulate(tokens.begin(), tokens.end(), std::int64_t{0}));
    const auto most = static_cast<std::int64_t>(
        std::min(total / (1 - slack.most) / capacity, double(tokens.size())));
    std::int64_t bins = fewest;
    for (int round = 0; round < 8 && bins < most;
         ++round) {  // more bins: a lower mean, more unused
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

  // False if a sample found no room or a bin stayed empty.
  bool construct_by_kind(double cheap) {
    bins_.assign(num_bins_, {});
    std::vector<double> above(items_.size());  // share of an average bin's cost above cheap tokens
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
      if (room < kLong && !is_costly(i)) size /= 1 << 20;  // after all others
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

  // Largest first, by the larger share of room and cost or by their sum, each into the bin that has
  // the most left of what it needs: of room and cost weighed as the sample has them. What finds no
  // room comes last, where bins are to be rearranged for it.
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

  // Puts a sample into a bin that has more room than most, when swaps with others have given it
  // more. False if kSqueezes did not.
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

  bool none_is_empty() const {
    return std::none_of(bins_.begin(), bins_.end(), [](const Bin& b) { return b.samples.empty(); });
  }

  double load(const Bin& bin) const {
    return std::max(double(bin.cost) / double(kMean), share(bin));
  }

  // The larger share of the two capacities that a bin or a sample takes.
  template <typename Sized>
  double share(const Sized& sized) const {
    double most = 0;
    if (sizes_.token_capacity) most = double(sized.tokens) / double(sizes_.token_capacity);
    if (sizes_.patch_capacity)
      most = std::max(most, double(sized.patches) / double(sizes_.patch_capacity));
    return most;
  }

  // Best-fit-decreasing's bins, and for each one more than it needed a sample out of a bin with
  // two.
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

  // Lowers the excess of a bin as far as it can.
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

  // Swaps a sample with one of about as many tokens out of any bin below its target, such that the
  // larger excess of the two bins becomes as small as the candidates allow.
  bool swap_one(std::int64_t costly) {
    const Bin& a = bins_[costly];
    const std::int64_t reach = sizes_.token_capacity / 256 + 1;  // tokens a swap may give away
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

  // Exchanges the groups (of the costly bin: mine_) that make the larger excess of two bins smallest.
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
        const std::int64_t cost = other->cost - mine.cost;  // what the costly bin gets more
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
      take(bin, places[n]);  // moves the last one here; the second place lies before the first
    }
    return taken;
  }

  // Nothing, every sample that is not costlier than a mean bin, and pairs of them, all or at random.
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

  const Sizes& sizes_;
  Random random_;
  std::vector<Item> items_;
  std::vector<std::int64_t> bin_of_, order_, by_tokens_;
  std::int64_t num_bins_ = 0;
  std::vector<Bin> bins_;
  std::vector<std::pair<std::int64_t, std::int64_t>> offered_;  // cost, sample; by tokens
  std::vector<std::int64_t> offered_tokens_;
  std::vector<Group> mine_, others_;
};

// The first that gives even bins to some thousand of the samples, spread over all of them; if none
// does, the one that comes closest. No matter of the seed.
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

}  // namespace

Plan balance(const Sizes& sizes, std::span<const std::int64_t> costs, std::uint64_t seed) {
  Balancer balancer(sizes, costs, seed, choose_slack(sizes, costs));
  balancer.search();
  return balancer.plan();
}

}  // namespace mmpack
