// uint8 pixels -> uint8 patches in Qwen's merge order -> floats.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mmpack {

// One resized picture; strides in bytes. A grey picture has channel_stride 0.
struct Picture {
  const std::uint8_t* pixels;
  std::ptrdiff_t row_stride;
  std::ptrdiff_t column_stride;
  std::ptrdiff_t channel_stride;
  std::int64_t channels;
};

// grid_h x grid_w patches of patch x patch pixels; both divisible by merge. All are positive. The
// picture is frame number `frame` of the patches' `frames`, 0 <= frame < frames.
struct PatchGrid {
  std::int64_t grid_h;
  std::int64_t grid_w;
  std::int64_t patch;
  std::int64_t merge;
  std::int64_t frames;
  std::int64_t frame;
};

// Writes one frame of grid_h * grid_w rows of channels * frames * patch * patch bytes to `out`:
// merge x merge blocks in reading order, the patches of a block in reading order. Equal to the
// transposition in transformers' image and video processors, without the floats and the repeated
// frame of a still.
void patchify(const Picture& picture, const PatchGrid& grid, std::uint8_t* out);

// Patches (num_patches, channels, pixels) to floats (num_patches, channels, frames, pixels) by a
// table (channels, 256) of a byte's float, repeated in each frame.
void normalize(const std::uint8_t* patches, std::int64_t num_patches, std::int64_t channels,
               std::int64_t pixels, std::int64_t frames, const float* table, float* out);

}  // namespace mmpack
