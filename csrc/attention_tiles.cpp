#include "attention_tiles.h"

#include <algorithm>
#include <array>
#include <vector>

namespace mmpack {
namespace {

using Tile = std::array<std::int32_t, 4>;  // [begin, end) of rows, and of their segment

// In reading order.
std::vector<Tile> cut_tiles(std::span<const std::int32_t> offsets) {
  std::vector<Tile> found;
  std::int32_t joined_begin = 0, joined_end = 0;  // rows of short segments to be joined
  const auto close = [&] {
    if (joined_begin < joined_end) {
      found.push_back({joined_begin, joined_end, joined_begin, joined_end});
    }
  };
  for (std::size_t s = 1; s < offsets.size(); ++s) {
    const std::int32_t begin = offsets[s - 1], end = offsets[s];
    if (end - joined_begin <= kTile) {
      joined_end = end;
      continue;
    }
    close();
    joined_begin = begin;
    joined_end = end;
    if (end - begin > kTile) {
      for (std::int64_t row = begin; row < end; row += kTile) {
        const std::int64_t last = std::min<std::int64_t>(row + kTile, end);
        found.push_back(
            {static_cast<std::int32_t>(row), static_cast<std::int32_t>(last), begin, end});
      }
      joined_begin = end;
    }
  }
  close();
  return found;
}

}  // namespace

std::int64_t attention_tiles(std::span<const std::int32_t> offsets, bool causal,
                             std::span<std::int32_t> tiles) {
  std::vector<Tile> found = cut_tiles(offsets);
  std::stable_sort(found.begin(), found.end(), [&](const Tile& a, const Tile& b) {
    const int last = causal ? 1 : 3;
    return a[last] - a[2] > b[last] - b[2];
  });
  auto* row = tiles.data();
  for (const Tile& tile : found) row = std::copy(tile.begin(), tile.end(), row);
  return static_cast<std::int64_t>(found.size());
}

std::int64_t count_tiles(std::span<const std::int32_t> offsets) {
  return static_cast<std::int64_t>(cut_tiles(offsets).size());
}

}  // namespace mmpack
