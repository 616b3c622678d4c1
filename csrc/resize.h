// uint8 pixels -> resized as Pillow resizes them -> uint8 patches in Qwen's merge order.
#pragma once

#include <cstddef>
#include <cstdint>

#include "patchify.h"
#include "resize_kernels.h"

namespace mmpack {

// A picture as Pillow holds it: rows of pixels of 4 bytes (three channels and one byte that is not
// used), or of 1 byte (grey, which gives three equal channels).
struct Source {
  const std::uint8_t* pixels;
  std::int64_t height;
  std::int64_t width;
  std::int64_t pixel_bytes;  // 4 or 1
};

// Bytes of the memory that `resize` takes for rows between the passes.
std::int64_t resize_scratch(const Source& source, const PatchGrid& grid, bool vertical_first);

// Resizes a picture to grid_h * patch x grid_w * patch pixels and writes them as one frame of
// patches of 3 channels, as `patchify` does. The pixels are those of Pillow's bicubic filter for 8
// bits, bit for bit: weights in double precision, rounded to 22 bits, and a byte between the two
// passes, so their order matters. All sizes are positive, at most 2^20.
void resize(const Source& source, const PatchGrid& grid, bool vertical_first, const Kernels& kernels,
            std::uint8_t* out);

}  // namespace mmpack
