// Bins by how high they are filled.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <queue>
#include <utility>
#include <vector>

namespace mmpack {

// Bins by a level that only rises; the lowest that has room for a sample is near the top.
class Levels {
 public:
  explicit Levels(std::int64_t num_bins) : level_(num_bins, 0.0) {
    for (std::int64_t b = 0; b < num_bins; ++b) lowest_.emplace(0.0, b);
  }

  void raise(std::int64_t bin, double level) {
    level_[bin] = level;
    lowest_.emplace(level, bin);  // the entry of the old level is skipped when it comes up
  }
  double operator[](std::int64_t bin) const { return level_[bin]; }

  // The lowest bin with room for the tokens that `fits`, -1 if none was found. Bins without room
  // for the tokens wait aside, for they would be looked at again and again.
  template <typename Room, typename Fits>
  std::int64_t find(std::int64_t tokens, const Room& room, const Fits& fits) {
    std::int64_t found = -1;
    refused_.clear();
    do {
      for (int n = 0; n < kReturned && !waiting_.empty() && waiting_.top().first >= tokens; ++n) {
        const std::int64_t bin = waiting_.top().second;
        waiting_.pop();
        lowest_.emplace(level_[bin], bin);
      }
      while (found < 0 && !lowest_.empty() && refused_.size() < kRefused) {
        const auto [level, bin] = lowest_.top();
        if (level == level_[bin]) {
          if (fits(bin)) {
            found = bin;
            break;
          }
          if (room(bin) < tokens) {
            waiting_.emplace(room(bin), bin);
          } else {
            refused_.push_back(lowest_.top());
          }
        }
        lowest_.pop();
      }
    } while (lowest_.empty() && !waiting_.empty() && waiting_.top().first >= tokens);
    for (const auto& entry : refused_) lowest_.push(entry);
    return found;
  }

 private:
  static constexpr int kReturned = 16;  // bins that waited for smaller samples, looked at again
  static constexpr std::size_t kRefused =
      16;  // bins without room for patches looked at for a sample

  using Entry = std::pair<double, std::int64_t>;
  std::vector<double> level_;
  std::priority_queue<Entry, std::vector<Entry>, std::greater<>> lowest_;
  std::priority_queue<std::pair<std::int64_t, std::int64_t>> waiting_;  // room, bin
  std::vector<Entry> refused_;
};

}  // namespace mmpack
