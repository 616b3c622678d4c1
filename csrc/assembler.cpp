#include "assembler.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace mmpack {
namespace {

constexpr std::int64_t kMostRows = std::numeric_limits<std::int32_t>::max();
constexpr std::int64_t kIgnore = -100;  // label of a token without loss
// The largest position: up to here, float32 steps are exact or rounded as in the reference.
constexpr float kMostPosition = 1 << 30;

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

struct Grid {
  std::int64_t frames, height, width;

  std::int64_t patches() const { return frames * height * width; }
};

Grid grid_of(std::span<const std::int32_t> grid_thw, std::size_t n) {
  return {grid_thw[3 * n], grid_thw[3 * n + 1], grid_thw[3 * n + 2]};
}

// An image or video in the tower's order.
struct Shown {
  std::size_t grid, feature;  // its index, and that of its first feature
  std::size_t place;          // of the next marker's first token in feature_token
  std::int32_t times;         // markers that show it
};

// By the number of the first marker that shows it; writes vision_grid_thw and feature_offsets.
std::vector<Shown> order_shown(const Samples& samples, const std::vector<bool>& is_image,
                               const PackBuffers& out) {
  std::vector<Shown> shown(samples.num_grids());
  for (const std::int32_t first : samples.first_shown) ++shown[first].times;
  std::size_t grid = 0, feature = 0;
  std::int32_t end = 0;
  out.feature_offsets[0] = 0;
  for (const bool images : {true, false}) {
    for (std::size_t g = 0; g < shown.size(); ++g) {
      if (!shown[g].times || is_image[g] != images) continue;
      shown[g].grid = grid;
      shown[g].feature = feature;
      shown[g].place = static_cast<std::size_t>(end);
      std::copy_n(&samples.grid_thw[3 * g], 3, &out.vision_grid_thw[3 * grid++]);
      const auto count = static_cast<std::size_t>(grid_of(samples.grid_thw, g).patches() /
                                                  samples.merge_size / samples.merge_size);
      for (const std::size_t last = feature + count; feature < last;) {
        out.feature_offsets[++feature] = end += shown[g].times;
      }
    }
  }
  return shown;
}

// Whether each marker is an image's.
std::vector<bool> find_images(const Samples& samples) {
  std::vector<bool> is_image;
  is_image.reserve(samples.num_grids());
  for (const std::int32_t id : samples.input_ids) {
    if (id == samples.image_id || id == samples.video_id) is_image.push_back(id == samples.image_id);
  }
  return is_image;
}

// Writes the patch indices for out.vision_grid_thw, which must be written before.
void write_patches(std::int64_t merge, const PackBuffers& out) {
  std::int32_t frame = 0, patch = 0;
  auto* place = out.vision_position_ids.data();
  out.vision_cu_seqlens[0] = 0;
  for (auto grid = out.vision_grid_thw.begin(); grid != out.vision_grid_thw.end(); grid += 3) {
    const std::int64_t frames = grid[0], height = grid[1], width = grid[2];
    for (std::int64_t t = 0; t < frames; ++t) {
      const auto size = static_cast<std::int32_t>(height * width);
      std::fill_n(&out.vision_segment_ids[patch], size, frame);
      patch += size;
      out.vision_cu_seqlens[++frame] = patch;
      for (std::int64_t column = 0; column < width; column += merge) {
        for (std::int64_t i = 0; i < merge; ++i) {
          for (std::int64_t j = column; j < column + merge; ++j) {
            *place++ = i;
            *place++ = j;
          }
        }
      }
      const std::int64_t row_of_features = merge * width;  // and every further one like it
      for (std::int64_t n = row_of_features; n < size; ++n, place += 2) {
        place[0] = place[-2 * row_of_features] + merge;
        place[1] = place[1 - 2 * row_of_features];
      }
    }
  }
}

// Stable sort by the upper 32 bits, the largest of which is `largest`.
void sort_by_id(std::vector<std::uint64_t>& text, std::uint64_t largest) {
  constexpr int kBits = 11;
  constexpr std::uint64_t kDigits = 1 << kBits;
  std::vector<std::uint64_t> sorted(text.size());
  for (int shift = 0; largest >> shift; shift += kBits) {
    const auto digit = [&](std::uint64_t token) { return (token >> 32 >> shift) % kDigits; };
    std::array<std::size_t, kDigits + 1> start{};
    for (const std::uint64_t token : text) ++start[digit(token) + 1];
    for (std::size_t d = 0; d < kDigits; ++d) start[d + 1] += start[d];
    for (const std::uint64_t token : text) sorted[start[digit(token)]++] = token;
    text.swap(sorted);
  }
}

bool ascend(std::span<const std::int32_t> offsets, std::size_t end) {
  return !offsets.empty() && offsets.front() == 0 &&
         offsets.back() == static_cast<std::int64_t>(end) && std::ranges::is_sorted(offsets);
}

std::int64_t longest(std::span<const std::int32_t> offsets) {
  std::int64_t most = 0;
  for (std::size_t s = 1; s < offsets.size(); ++s) {
    most = std::max<std::int64_t>(most, offsets[s] - offsets[s - 1]);
  }
  return most;
}

// Sorts text tokens, given as id << 32 | position with positions ascending, by id, then position.
// Writes the sorted positions and the starts of runs of one id and at most kMaxRun tokens; returns
// the number of runs.
std::int64_t text_by_id(std::vector<std::uint64_t> text, std::span<std::int32_t> order,
                        std::span<std::int32_t> offsets) {
  std::uint64_t largest = 0;
  for (const std::uint64_t token : text) largest = std::max(largest, token >> 32);
  sort_by_id(text, largest);
  std::int64_t runs = 0, start = 0;
  for (std::size_t n = 0; n < text.size(); ++n) {
    const bool is_new = n == 0 || text[n] >> 32 != text[n - 1] >> 32;
    if (is_new || static_cast<std::int64_t>(n) - start == kMaxRun) {
      start = static_cast<std::int64_t>(n);
      offsets[runs++] = static_cast<std::int32_t>(n);
    }
    order[n] = static_cast<std::int32_t>(text[n]);  // the lower half: the place
  }
  offsets[runs] = static_cast<std::int32_t>(text.size());
  return runs;
}

// The number of runs that text_by_id makes of the text tokens, without markers.
std::int64_t count_runs(const Samples& samples, std::size_t num_text) {
  struct Slot {
    std::int32_t id = -1, count = 0;
  };
  std::vector<Slot> slots(std::bit_ceil(2 * num_text + 1));  // at most half full
  const std::size_t last = slots.size() - 1;
  std::int64_t runs = 0;
  for (const std::int32_t id : samples.input_ids) {
    if (id == samples.image_id || id == samples.video_id) continue;
    std::size_t at = (static_cast<std::uint32_t>(id) * std::size_t{0x9e3779b1} >> 16) & last;
    while (slots[at].id != id && slots[at].id >= 0) at = (at + 1) & last;
    slots[at].id = id;
    runs += slots[at].count++ % kMaxRun == 0;
  }
  return runs;
}

}  // namespace

PackSize measure(const Samples& samples) {
  const auto n = static_cast<std::int64_t>(samples.input_ids.size());
  const auto& offsets = samples.offsets;
  require(n <= kMostRows, "a pack must have fewer than 2^31 tokens");
  require(samples.labels.size() == samples.input_ids.size(),
          "input_ids and labels must have the same length");
  require(offsets.size() >= 2 && ascend(offsets, samples.input_ids.size()),
          "offsets must ascend from 0 to the number of input_ids");
  require(samples.grid_offsets.size() == offsets.size() &&
              ascend(samples.grid_offsets, samples.num_grids()),
          "grid_offsets must have the length of offsets and ascend from 0 to the number of grids");
  require(samples.temporal_step.size() == samples.num_grids(),
          "temporal_step must have one value per grid");
  require(samples.first_shown.size() == samples.num_grids(),
          "first_shown must have one value per grid");
  require(samples.image_id != samples.video_id, "image_id and video_id must differ");
  require(samples.merge_size >= 1, "merge_size must be positive");
  const auto is_marker = [&](std::int64_t id) {
    return id == samples.image_id || id == samples.video_id;
  };
  for (const std::int32_t id : samples.input_ids) {
    require(id >= 0, "input_ids must not be negative");
  }
  for (std::size_t s = 0; s < samples.num_segments(); ++s) {
    const auto* ids = samples.input_ids.data();
    const auto markers = std::count_if(ids + offsets[s], ids + offsets[s + 1], is_marker);
    const auto grids = samples.grid_offsets[s + 1] - samples.grid_offsets[s];
    if (markers != grids) {
      throw std::invalid_argument("there must be one grid per marker, got " +
                                  std::to_string(markers) + " image and video markers and " +
                                  std::to_string(grids) + (grids == 1 ? " grid" : " grids"));
    }
  }

  PackSize size{};
  const std::vector<bool> is_image = find_images(samples);
  for (std::size_t g = 0; g < samples.num_grids(); ++g) {
    const Grid grid = grid_of(samples.grid_thw, g);
    if (std::min({grid.frames, grid.height, grid.width}) < 1 ||
        grid.height % samples.merge_size || grid.width % samples.merge_size) {
      throw std::invalid_argument(
          "grids must be positive, height and width multiples of " +
          std::to_string(samples.merge_size) + ", got " + std::to_string(grid.frames) + " x " +
          std::to_string(grid.height) + " x " + std::to_string(grid.width));
    }
    require(grid.frames * grid.height <= kMostRows / grid.width,
            "a pack must have fewer than 2^31 patches");
    const float step = samples.temporal_step[g];
    require(step >= 0 && static_cast<float>(grid.frames - 1) * step <= kMostPosition,
            "temporal_step must not be negative or lead beyond position 2^30");
    const std::int64_t features = grid.patches() / samples.merge_size / samples.merge_size;
    size.placeholders += features;
    size.images += is_image[g];
    const auto first = static_cast<std::size_t>(samples.first_shown[g]);  // huge if negative
    require(first <= g && samples.first_shown[first] == samples.first_shown[g] &&
                is_image[first] == is_image[g] &&
                std::equal(&samples.grid_thw[3 * g], &samples.grid_thw[3 * g] + 3,
                           &samples.grid_thw[3 * first]),
            "first_shown must be, for each marker, the first one of the same kind and grid that "
            "shows the same");
    if (first < g) continue;
    require(grid.patches() <= kMostRows - size.patches, "a pack must have fewer than 2^31 patches");
    size.patches += grid.patches();
    size.frames += grid.frames;
    size.features += features;
    ++size.distinct;
    if (is_image[g]) size.image_features += features;
  }
  size.tokens = n - static_cast<std::int64_t>(samples.num_grids()) + size.placeholders;
  require(size.tokens <= kMostRows, "a pack must have fewer than 2^31 tokens");
  return size;
}

PackCounts assemble(const Samples& samples, const PackSize& size, const PackBuffers& out) {
  const std::size_t num_tokens = out.input_ids.size();
  auto *text_places = out.position_ids.data(), *frames = text_places + num_tokens,
       *rows = frames + num_tokens, *columns = rows + num_tokens;
  std::vector<std::uint64_t> text;  // id << 32 | place
  text.reserve(out.text_order.size());
  PackCounts counts{};
  std::size_t token = 0, marker = 0;
  std::size_t image = 0, video = static_cast<std::size_t>(size.images);  // the next grids
  std::vector<Shown> all_shown = order_shown(samples, find_images(samples), out);
  out.cu_seqlens[0] = 0;
  for (std::size_t segment = 0; segment < samples.num_segments(); ++segment) {
    const std::size_t begin = token;
    std::int64_t position = 0;  // M-RoPE position of the next token
    for (std::int32_t n = samples.offsets[segment]; n < samples.offsets[segment + 1]; ++n) {
      const std::int64_t id = samples.input_ids[n];
      if (id != samples.image_id && id != samples.video_id) {
        // nothing predicts a segment's first token
        const std::int64_t label = token == begin ? kIgnore : samples.labels[n];
        out.input_ids[token] = id;
        out.labels[token] = label;
        text_places[token] = static_cast<std::int64_t>(token - begin);
        frames[token] = rows[token] = columns[token] = position++;
        out.feature_index[token] = -1;
        if (label != kIgnore) {
          out.supervised_index[counts.supervised++] = static_cast<std::int32_t>(token) - 1;
        }
        text.push_back(static_cast<std::uint64_t>(id) << 32 | token);
        ++token;
        continue;
      }
      const Grid grid = grid_of(samples.grid_thw, marker);
      const float step = samples.temporal_step[marker];
      Shown& shown = all_shown[samples.first_shown[marker]];
      const std::size_t number = id == samples.image_id ? image++ : video++;
      std::copy_n(&samples.grid_thw[3 * marker++], 3, &out.grid_thw[3 * number]);
      out.vision_index[number] = static_cast<std::int32_t>(shown.grid);
      const std::int64_t height = grid.height / samples.merge_size;
      const std::int64_t width = grid.width / samples.merge_size;
      const auto count = static_cast<std::size_t>(grid.frames * height * width);
      std::fill_n(&out.input_ids[token], count, id);
      std::fill_n(&out.labels[token], count, kIgnore);
      std::iota(text_places + token, text_places + token + count, token - begin);
      const auto feature_index = out.feature_index.subspan(token, count);
      std::iota(feature_index.begin(), feature_index.end(), static_cast<std::int32_t>(shown.feature));
      const auto first = static_cast<std::int32_t>(token);
      auto* place = out.feature_token.data() + shown.place++;
      if (shown.times == 1) {
        std::iota(place, place + count, first);
      } else {
        for (std::size_t f = 0; f < count; ++f) {
          place[f * shown.times] = first + static_cast<std::int32_t>(f);
        }
      }
      for (std::int64_t t = 0; t < grid.frames; ++t) {
        const auto at = static_cast<std::int64_t>(static_cast<float>(t) * step);
        for (std::int64_t h = 0; h < height; ++h) {
          for (std::int64_t w = 0; w < width; ++w, ++token) {
            frames[token] = position + at;
            rows[token] = position + h;
            columns[token] = position + w;
          }
        }
      }
      position += std::max(height, width);
    }
    std::fill_n(out.segment_ids.data() + begin, token - begin, static_cast<std::int32_t>(segment));
    out.cu_seqlens[segment + 1] = static_cast<std::int32_t>(token);
  }
  write_patches(samples.merge_size, out);
  counts.runs = text_by_id(std::move(text), out.text_order, out.text_id_offsets);
  counts.tiles = attention_tiles(out.cu_seqlens, true, out.tiles);
  counts.vision_tiles = attention_tiles(out.vision_cu_seqlens, false, out.vision_tiles);
  counts.max_seqlen = longest(out.cu_seqlens);
  counts.vision_max_seqlen = longest(out.vision_cu_seqlens);
  return counts;
}

PackCounts outline(const Samples& samples, const PackSize& size, const OutlineBuffers& out) {
  PackCounts counts{};
  std::size_t token = 0, marker = 0, frame = 1;
  std::vector<std::size_t> videos;
  const auto add_frames = [&](const Grid& grid) {
    for (std::int64_t t = 0; t < grid.frames; ++t, ++frame) {
      const auto patches = static_cast<std::int32_t>(grid.height * grid.width);
      out.vision_cu_seqlens[frame] = out.vision_cu_seqlens[frame - 1] + patches;
    }
  };
  out.cu_seqlens[0] = out.vision_cu_seqlens[0] = 0;
  for (std::size_t segment = 0; segment < samples.num_segments(); ++segment) {
    const std::size_t begin = token;
    for (std::int32_t n = samples.offsets[segment]; n < samples.offsets[segment + 1]; ++n) {
      const std::int64_t id = samples.input_ids[n];
      if (id != samples.image_id && id != samples.video_id) {
        const std::int64_t label = token == begin ? kIgnore : samples.labels[n];
        out.labels[token] = label;
        if (label != kIgnore) {
          out.supervised_index[counts.supervised++] = static_cast<std::int32_t>(token) - 1;
        }
        ++token;
        continue;
      }
      const Grid grid = grid_of(samples.grid_thw, marker);
      const auto count =
          static_cast<std::size_t>(grid.patches() / samples.merge_size / samples.merge_size);
      std::fill_n(&out.labels[token], count, kIgnore);
      token += count;
      const bool is_new = samples.first_shown[marker] == static_cast<std::int64_t>(marker);
      if (is_new && id == samples.image_id) add_frames(grid);
      if (is_new && id == samples.video_id) videos.push_back(marker);
      out.markers[marker++] = n;
    }
    out.cu_seqlens[segment + 1] = static_cast<std::int32_t>(token);
  }
  for (const std::size_t video : videos) add_frames(grid_of(samples.grid_thw, video));
  counts.runs = count_runs(samples, static_cast<std::size_t>(size.tokens - size.placeholders));
  counts.tiles = count_tiles(out.cu_seqlens);
  counts.vision_tiles = count_tiles(out.vision_cu_seqlens);
  counts.max_seqlen = longest(out.cu_seqlens);
  counts.vision_max_seqlen = longest(out.vision_cu_seqlens);
  return counts;
}

}  // namespace mmpack
