// Bins by fill level.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace mmpack {

// Bins ordered by a level that only rises; the lowest bin with room for a sample is near the top.
// There is one entry per bin; its level is updated when it reaches the top, so raising a level is
// free.
class Levels {
 public:
  explicit Levels(std::int64_t num_bins) {
    for (std::int64_t b = 0; b < num_bins; ++b) lowest_.emplace_back(0.0, b);  // is a heap
  }

  // The lowest bin with room for the tokens for which `fits` is true, -1 if none was found. Bins
  // without room for the tokens are set aside, so that they are not examined repeatedly.
  template <typename Level, typename Room, typename Fits>
  std::int64_t find(std::int64_t tokens, const Level& level, const Room& room, const Fits& fits) {
    std::int64_t found = -1;
    refused_.clear();
    do {
      for (int n = 0; n < kReturned && !waiting_.empty() && waiting_.front().first >= tokens; ++n) {
        const std::int64_t bin = waiting_.front().second;
        pop(waiting_, std::less<>());
        push(lowest_, {level(bin), bin}, std::greater<>());
      }
      while (!lowest_.empty() && refused_.size() < kRefused) {
        const auto [known, bin] = lowest_.front();
        const Entry now{level(bin), bin};
        if (now.first == known && fits(bin)) {
          found = bin;
          break;
        }
        pop(lowest_, std::greater<>());
        if (now.first != known) {
          push(lowest_, now, std::greater<>());
        } else if (room(bin) < tokens) {
          push(waiting_, {room(bin), bin}, std::less<>());
        } else {
          refused_.push_back(now);
        }
      }
    } while (lowest_.empty() && !waiting_.empty() && waiting_.front().first >= tokens);
    for (const Entry& entry : refused_) push(lowest_, entry, std::greater<>());
    return found;
  }

 private:
  static constexpr int kReturned = 16;  // bins set aside that are examined again
  static constexpr std::size_t kRefused =
      16;  // bins without room for patches that are examined per sample

  using Entry = std::pair<double, std::int64_t>;

  template <typename Heap, typename Order>
  static void push(Heap& heap, const typename Heap::value_type& entry, const Order& order) {
    heap.push_back(entry);
    std::push_heap(heap.begin(), heap.end(), order);
  }

  template <typename Heap, typename Order>
  static void pop(Heap& heap, const Order& order) {
    std::pop_heap(heap.begin(), heap.end(), order);
    heap.pop_back();
  }

  std::vector<Entry> lowest_;                                   // lowest level first
  std::vector<std::pair<std::int64_t, std::int64_t>> waiting_;  // (room, bin), most room first
  std::vector<Entry> refused_;
};

}  // namespace mmpack
