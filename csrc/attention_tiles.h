// The work of an attention program: rows of one long segment, or several short segments.
#pragma once

#include <cstdint>
#include <span>

namespace mmpack {

constexpr std::int64_t kTile = 128;  // attention rows per program

// Attention rows [begin, end) and the [begin, end) of their segment, most work first; returns the
// number of tiles. offsets (S + 1,) ascend from 0.
std::int64_t attention_tiles(std::span<const std::int32_t> offsets, bool causal,
                             std::span<std::int32_t> tiles);

constexpr std::int64_t most_tiles(std::int64_t rows, std::int64_t segments) {
  return segments + rows / kTile;
}

// Their number, without sorting them.
std::int64_t count_tiles(std::span<const std::int32_t> offsets);

}  // namespace mmpack
