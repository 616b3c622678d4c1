#include "patchify.h"

namespace mmpack {

namespace {

// Writes one patch, channel by channel. With constant Column and Patch, the compiler unrolls the
// innermost loop.
template <std::ptrdiff_t Column, std::int64_t Patch>
std::uint8_t* write_patch(const Picture& picture, const std::uint8_t* corner, std::int64_t patch_side,
                          std::int64_t other_frames, std::uint8_t* out) {
  const std::ptrdiff_t column = Column ? Column : picture.column_stride;
  const std::int64_t patch = Patch ? Patch : patch_side;
  for (std::int64_t c = 0; c < picture.channels; ++c) {
    const std::uint8_t* row = corner + c * picture.channel_stride;
    for (std::int64_t y = 0; y < patch; ++y, row += picture.row_stride, out += patch) {
      for (std::int64_t x = 0; x < patch; ++x) out[x] = row[x * column];
    }
    out += other_frames;
  }
  return out;
}

template <std::ptrdiff_t Column, std::int64_t Patch>
void write_patches(const Picture& picture, const PatchGrid& grid, std::uint8_t* out) {
  const std::ptrdiff_t down = grid.patch * picture.row_stride;
  const std::ptrdiff_t right = grid.patch * picture.column_stride;
  const std::int64_t other_frames = (grid.frames - 1) * grid.patch * grid.patch;  // per channel
  out += grid.frame * grid.patch * grid.patch;
  for (std::int64_t top = 0; top < grid.grid_h; top += grid.merge) {
    for (std::int64_t left = 0; left < grid.grid_w; left += grid.merge) {
      for (std::int64_t i = top; i < top + grid.merge; ++i) {
        for (std::int64_t j = left; j < left + grid.merge; ++j) {
          const std::uint8_t* corner = picture.pixels + i * down + j * right;
          out = write_patch<Column, Patch>(picture, corner, grid.patch, other_frames, out);
        }
      }
    }
  }
}

}  // namespace

void patchify(const Picture& picture, const PatchGrid& grid, std::uint8_t* out) {
  if (picture.column_stride == 3 && grid.patch == 14) return write_patches<3, 14>(picture, grid, out);
  if (picture.column_stride == 3 && grid.patch == 16) return write_patches<3, 16>(picture, grid, out);
  write_patches<0, 0>(picture, grid, out);
}

void normalize(const std::uint8_t* patches, std::int64_t num_patches, std::int64_t channels,
               std::int64_t pixels, std::int64_t frames, const float* table, float* out) {
  for (std::int64_t row = 0; row < num_patches * channels; ++row, patches += pixels) {
    const float* values = table + row % channels * 256;
    for (std::int64_t frame = 0; frame < frames; ++frame, out += pixels) {
      for (std::int64_t x = 0; x < pixels; ++x) out[x] = values[patches[x]];
    }
  }
}

}  // namespace mmpack
