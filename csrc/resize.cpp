#include "resize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <utility>

namespace mmpack {

namespace {

constexpr std::int64_t kChannels = 3;

double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

// Weights that are not 0, of the input from `first` on.
struct Window {
  std::int64_t first;
  std::vector<std::int32_t> weights;
};

Window window(std::int64_t size, std::int64_t out_size, std::int64_t place) {
  const double scale = static_cast<double>(size) / static_cast<double>(out_size);
  const double stretch = std::max(scale, 1.0), support = 2 * stretch;
  const double center = (static_cast<double>(place) + 0.5) * scale;
  auto first = std::max(static_cast<std::int64_t>(center - support + 0.5), std::int64_t{0});
  const auto last = std::min(static_cast<std::int64_t>(center + support + 0.5), size);
  std::vector<double> values(static_cast<std::size_t>(last - first));
  const double unstretch = 1 / stretch;
  double total = 0;
  for (std::int64_t x = 0; x < last - first; ++x) {
    values[x] = bicubic((static_cast<double>(x + first) - center + 0.5) * unstretch);
    total += values[x];
  }
  Window result{first, {}};
  for (const double value : values) {
    const double scaled = (total != 0 ? value / total : value) * (1 << kWeightBits);
    result.weights.push_back(static_cast<std::int32_t>(value < 0 ? scaled - 0.5 : scaled + 0.5));
  }
  while (result.weights.size() > 1 && !result.weights.back()) result.weights.pop_back();
  const auto zeros = std::ranges::find_if(result.weights, [](std::int32_t k) { return k != 0; });
  if (zeros != result.weights.end()) {
    result.first += zeros - result.weights.begin();
    result.weights.erase(result.weights.begin(), zeros);
  }
  return result;
}

Weights make_weights(std::int64_t size, std::int64_t out_size) {
  std::vector<Window> windows;
  windows.reserve(static_cast<std::size_t>(out_size));
  for (std::int64_t place = 0; place < out_size; ++place) windows.push_back(window(size, out_size, place));
  Weights weights{0, std::vector<std::int64_t>(windows.size()), {}, {}};
  std::int64_t first = size;
  for (std::size_t place = windows.size(); place-- > 0;) {  // first must not decrease
    const auto& [begin, values] = windows[place];
    first = weights.first[place] = std::min(first, begin);
    weights.taps = std::max(weights.taps, begin + static_cast<std::int64_t>(values.size()) - first);
  }
  weights.taps += weights.taps % 2;
  weights.high.resize(windows.size() * weights.taps);
  weights.low.resize(windows.size() * weights.taps);
  for (std::size_t place = 0; place < windows.size(); ++place) {
    const auto& [begin, values] = windows[place];
    std::int64_t& from = weights.first[place];
    from = std::max(std::min(from, size - weights.taps), std::int64_t{0});
    std::size_t tap = place * weights.taps + static_cast<std::size_t>(begin - from);
    for (const std::int32_t k : values) {
      const std::int32_t high = (k + (1 << (kLowBits - 1))) >> kLowBits;
      weights.high[tap] = static_cast<std::int16_t>(high);
      weights.low[tap++] = static_cast<std::int16_t>(k - high * (1 << kLowBits));
    }
  }
  return weights;
}

// A data set repeats few sizes. Kept per thread: no lock; at most 64, none of them huge.
std::shared_ptr<const Weights> weights_of(std::int64_t size, std::int64_t out_size) {
  constexpr std::size_t kMost = 64, kHuge = std::size_t{1} << 18;
  thread_local std::map<std::pair<std::int64_t, std::int64_t>, std::shared_ptr<const Weights>> kept;
  const auto found = kept.find({size, out_size});
  if (found != kept.end()) return found->second;
  auto made = std::make_shared<const Weights>(make_weights(size, out_size));
  if (made->high.size() > kHuge) return made;
  if (kept.size() == kMost) kept.clear();
  kept[{size, out_size}] = made;
  return made;
}

// Where the pixels of one row of the output go.
class PatchRows {
 public:
  PatchRows(const PatchGrid& grid, std::uint8_t* out)
      : grid_(grid), out_(out), frame_bytes_(grid.patch * grid.patch) {}

  // One row of pixels: three planes, or one for all three channels.
  void write(std::int64_t y, const std::uint8_t* planes, bool is_grey) {
    if (grid_.patch == 14) return write_segments<14>(y, planes, is_grey);
    if (grid_.patch == 16) return write_segments<16>(y, planes, is_grey);
    write_segments<0>(y, planes, is_grey);
  }

 private:
  template <std::int64_t Patch>
  void write_segments(std::int64_t y, const std::uint8_t* planes, bool is_grey) {
    const std::int64_t patch = Patch ? Patch : grid_.patch, merge = grid_.merge;
    const std::int64_t channel_bytes = grid_.frames * frame_bytes_, patch_bytes = kChannels * channel_bytes;
    const std::int64_t i = y / patch, block_row = i / merge * merge * grid_.grid_w + i % merge * merge;
    std::uint8_t* row = out_ + block_row * patch_bytes + grid_.frame * frame_bytes_ + y % patch * patch;
    const std::int64_t plane_bytes = is_grey ? 0 : grid_.grid_w * patch;
    for (std::int64_t left = 0; left < grid_.grid_w; left += merge) {
      std::uint8_t* to = row + left * merge * patch_bytes;
      for (std::int64_t j = 0; j < merge; ++j, planes += patch, to += patch_bytes) {
        for (std::int64_t c = 0; c < kChannels; ++c) {
          std::memcpy(to + c * channel_bytes, planes + c * plane_bytes, static_cast<std::size_t>(patch));
        }
      }
    }
  }

  PatchGrid grid_;
  std::uint8_t* out_;
  std::int64_t frame_bytes_;
};

// Rows of the source or of the vertical pass -> rows of planes, `rows_at_once` at a time: two rows of
// pixels, or eight grey rows, of which each four are made rows of pixels of four bytes.
class HorizontalPass {
 public:
  HorizontalPass(std::int64_t width, std::int64_t pixel_bytes, const Weights& weights, const Kernels& kernels)
      : width_(width),
        is_grey_(pixel_bytes == 1),
        is_copied_(is_grey_ || width < weights.taps),
        weights_(weights),
        kernels_(kernels),
        pixels_(is_copied_ ? 2 * 4 * padded(width, weights.taps) : 0) {}

  static std::int64_t padded(std::int64_t width, std::int64_t taps) { return std::max(width, taps); }
  static std::int64_t rows_at_once(std::int64_t pixel_bytes) { return pixel_bytes == 1 ? 8 : 2; }

  // Row number n of `rows` as planes to[n]; all of rows_at_once.
  void run(const std::uint8_t* const* rows, std::uint8_t* const* to) {
    const auto places = static_cast<std::int64_t>(weights_.first.size());
    Across across{};
    for (int r = 0; r < 2; ++r) {
      std::uint8_t* copy = pixels_.data() + (is_copied_ ? r * 4 * padded(width_, weights_.taps) : 0);
      across.rows[r] = is_copied_ ? copy : rows[r];
      if (is_grey_) {
        for (std::int64_t x = 0; x < width_; ++x) {
          for (int b = 0; b < 4; ++b) copy[4 * x + b] = rows[4 * r + b][x];
        }
        for (int b = 0; b < 4; ++b) across.planes[r][b] = to[4 * r + b];
      } else {
        if (is_copied_) std::memcpy(copy, rows[r], static_cast<std::size_t>(4 * width_));
        for (int b = 0; b < kChannels; ++b) across.planes[r][b] = to[r] + b * places;
      }
    }
    kernels_.across(across, weights_);
  }

 private:
  std::int64_t width_;
  bool is_grey_, is_copied_;
  const Weights& weights_;
  const Kernels& kernels_;
  std::vector<std::uint8_t> pixels_;
};

// The rows of a weighted sum; those behind the end have weight 0, so that any row may stand for them.
template <typename Row>
void vertical_pass(const Weights& weights, std::int64_t place, std::int64_t size, const Row& row,
                   const Kernels& kernels, std::int64_t n, std::vector<const std::uint8_t*>& rows,
                   std::uint8_t* out) {
  const std::int64_t taps = weights.taps;
  for (std::int64_t t = 0; t < taps; ++t) rows[t] = row(std::min(weights.first[place] + t, size - 1));
  kernels.down(rows.data(), weights.high.data() + place * taps, weights.low.data() + place * taps, taps, n, out);
}

}  // namespace

std::int64_t resize_scratch(const Source& source, const PatchGrid& grid, bool vertical_first) {
  const std::int64_t at_once = HorizontalPass::rows_at_once(source.pixel_bytes);
  if (vertical_first) return at_once * source.width * source.pixel_bytes;
  const std::int64_t height = grid.grid_h * grid.patch, width = grid.grid_w * grid.patch;
  const std::int64_t taps = std::min(source.height, 4 * (source.height / height + 2));
  return (taps + at_once) * width * (source.pixel_bytes == 1 ? 1 : kChannels);
}

void resize(const Source& source, const PatchGrid& grid, bool vertical_first, const Kernels& kernels,
            std::uint8_t* out) {
  const std::int64_t height = grid.grid_h * grid.patch, width = grid.grid_w * grid.patch;
  const auto down = weights_of(source.height, height), across = weights_of(source.width, width);
  const bool is_grey = source.pixel_bytes == 1;
  const std::int64_t row_bytes = width * (is_grey ? 1 : kChannels);
  const std::int64_t source_bytes = source.width * source.pixel_bytes;
  const std::int64_t at_once = HorizontalPass::rows_at_once(source.pixel_bytes);
  HorizontalPass horizontal(source.width, source.pixel_bytes, *across, kernels);
  PatchRows patches(grid, out);
  std::vector<const std::uint8_t*> taps(down->taps), from(at_once);
  std::vector<std::uint8_t*> to(at_once);
  const auto source_row = [&](std::int64_t y) { return source.pixels + y * source_bytes; };

  if (vertical_first) {
    std::vector<std::uint8_t> between(at_once * source_bytes), rows(at_once * row_bytes);
    for (std::int64_t n = 0; n < at_once; ++n) {
      from[n] = between.data() + n * source_bytes;
      to[n] = rows.data() + n * row_bytes;
    }
    for (std::int64_t y = 0; y < height; y += at_once) {
      const std::int64_t end = std::min(y + at_once, height);
      for (std::int64_t n = 0; n < end - y; ++n) {
        vertical_pass(*down, y + n, source.height, source_row, kernels, source_bytes, taps,
                      between.data() + n * source_bytes);
      }
      horizontal.run(from.data(), to.data());
      for (std::int64_t n = 0; n < end - y; ++n) patches.write(y + n, to[n], is_grey);
    }
    return;
  }

  // A ring of the rows between the passes: those of one weighted sum, and those made ahead of it.
  const std::int64_t capacity = std::min(down->taps, source.height) + at_once;
  std::vector<std::uint8_t> ring(capacity * row_bytes), row(row_bytes);
  const auto ring_row = [&](std::int64_t y) { return ring.data() + y % capacity * row_bytes; };
  std::int64_t made = std::max(down->first[0], std::int64_t{0});
  for (std::int64_t y = 0; y < height; ++y) {
    const std::int64_t needed = std::min(down->first[y] + down->taps, source.height);
    for (; made < needed; made += at_once) {
      for (std::int64_t n = 0; n < at_once; ++n) {
        from[n] = source_row(std::min(made + n, source.height - 1));
        to[n] = ring_row(made + n);
      }
      horizontal.run(from.data(), to.data());
    }
    vertical_pass(*down, y, source.height, ring_row, kernels, row_bytes, taps, row.data());
    patches.write(y, row.data(), is_grey);
  }
}

}  // namespace mmpack
