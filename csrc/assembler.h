// One pack from its samples: markers expanded, positions, and every index a training step needs.
//
// Equal to mmpack/reference.py, bit for bit, and written straight into the caller's memory. A
// marker is a token with the image or the video id; its grid determines its number of placeholders.
// Grids are ordered images first, then videos. Markers may show the same image or video: then it is
// encoded once, and the patches and features of what is shown have the order of the first markers.
#pragma once

#include <cstdint>
#include <span>

#include "attention_tiles.h"

namespace mmpack {

constexpr std::int64_t kMaxRun = 32;  // most tokens in a run of text_id_offsets

// The concatenated samples of a pack.
struct Samples {
  std::span<const std::int32_t> input_ids, labels;  // (n,), one marker per grid
  std::span<const std::int32_t> offsets;            // (S + 1,) of the samples in input_ids
  std::span<const std::int32_t> grid_thw;           // (I, 3) patches, in marker order
  std::span<const float> temporal_step;             // (I,) M-RoPE positions per temporal patch
  std::span<const std::int32_t> grid_offsets;       // (S + 1,) of the samples in grid_thw
  std::span<const std::int32_t> first_shown;        // (I,) the first marker that shows the same
  std::int64_t image_id, video_id, merge_size;

  std::size_t num_segments() const { return offsets.size() - 1; }
  std::size_t num_grids() const { return grid_thw.size() / 3; }
};

// Their size in a pack. Features, frames and patches are those of distinct images and videos.
struct PackSize {
  std::int64_t tokens, placeholders, features, frames, patches, images, distinct, image_features;
};

// Throws std::invalid_argument if arrays contradict each other or a pack exceeds 2^31 - 1 rows.
PackSize measure(const Samples& samples);

// The output arrays of a pack. Letters as in DESIGN.md; R runs and n tiles.
struct PackBuffers {
  std::span<std::int64_t> input_ids, labels;                 // (T,)
  std::span<std::int64_t> position_ids;                      // (4, T)
  std::span<std::int32_t> cu_seqlens;                        // (S + 1,)
  std::span<std::int32_t> segment_ids;                       // (T,)
  std::span<std::int32_t> tiles;                             // up to most_tiles(T, S)
  std::span<std::int32_t> feature_index;                     // (T,)
  std::span<std::int32_t> feature_token, feature_offsets;    // (M,), (F + 1,)
  std::span<std::int32_t> text_order, text_id_offsets;       // (T - M,), up to T - M + 1
  std::span<std::int32_t> supervised_index;                  // up to T - M
  std::span<std::int64_t> grid_thw;                          // (I, 3)
  std::span<std::int32_t> vision_index;                      // (I,)
  std::span<std::int64_t> vision_grid_thw;                   // (U, 3)
  std::span<std::int32_t> vision_cu_seqlens;                 // (frames + 1,)
  std::span<std::int32_t> vision_segment_ids, vision_tiles;  // (P,), up to most_tiles(P, frames)
  std::span<std::int64_t> vision_position_ids;               // (P, 2)
};

// The used lengths of arrays with an upper bound, and the longest segments.
struct PackCounts {
  std::int64_t supervised, runs, tiles, vision_tiles, max_seqlen, vision_max_seqlen;
};

// The samples must have been measured, and the arrays allocated with these sizes.
PackCounts assemble(const Samples& samples, const PackSize& size, const PackBuffers& out);

// The host's part of a pack that the device assembles
// (mmpack/ops/assembly/assemble_sequence.py).
struct OutlineBuffers {
  std::span<std::int64_t> labels;             // (T,)
  std::span<std::int32_t> supervised_index;   // up to T - M
  std::span<std::int32_t> cu_seqlens;         // (S + 1,)
  std::span<std::int32_t> vision_cu_seqlens;  // (frames + 1,)
  std::span<std::int32_t> markers;            // (I,) their positions in the samples' input_ids
};

// Like assemble: the same arguments and counts.
PackCounts outline(const Samples& samples, const PackSize& size, const OutlineBuffers& out);

}  // namespace mmpack
