// One pack from its samples: markers expanded, positions, and every index a training step needs.
//
// What mmpack/reference.py specifies, bit for bit, written once into the caller's memory. A marker
// is a token of one of two ids, an image's or a video's, and its grid says how often it stands in the
// pack. Grids, patches and features are images first, then videos.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace mmpack {

constexpr std::int64_t kTile = 128;   // rows of attention that one program takes
constexpr std::int64_t kMaxRun = 32;  // tokens of one id in a run of text_id_offsets

// The samples of a pack, one after the other.
struct Samples {
  std::span<const std::int32_t> input_ids, labels;  // (n,), one marker per grid
  std::span<const std::int32_t> offsets;            // (S + 1,) of the samples in them
  std::span<const std::int32_t> grid_thw;           // (I, 3) patches, in marker order
  std::span<const float> temporal_step;             // (I,) M-RoPE positions a temporal patch
  std::span<const std::int32_t> grid_offsets;       // (S + 1,) of the samples in it
  std::int64_t image_id, video_id, merge_size;

  std::size_t num_segments() const { return offsets.size() - 1; }
  std::size_t num_grids() const { return grid_thw.size() / 3; }
};

// What they take in a pack; images are the grids and features that are no video's.
struct PackSize {
  std::int64_t tokens, features, frames, patches, images, image_features;
};

// Throws std::invalid_argument where the samples contradict themselves or pass 2^31 - 1 rows.
PackSize measure(const Samples& samples);

// Where a pack is written; the letters of DESIGN.md, R runs and n tiles.
struct PackBuffers {
  std::span<std::int64_t> input_ids, labels;                 // (T,)
  std::span<std::int64_t> position_ids;                      // (4, T)
  std::span<std::int32_t> cu_seqlens;                        // (S + 1,)
  std::span<std::int32_t> segment_ids;                       // (T,)
  std::span<std::int32_t> tiles;                             // room for most_tiles(T, S)
  std::span<std::int32_t> feature_index, feature_token;      // (T,), (F,)
  std::span<std::int32_t> text_order, text_id_offsets;       // (T - F,), room for T - F + 1
  std::span<std::int32_t> supervised_index;                  // room for T - F
  std::span<std::int64_t> grid_thw;                          // (I, 3)
  std::span<std::int32_t> vision_cu_seqlens;                 // (frames + 1,)
  std::span<std::int32_t> vision_segment_ids, vision_tiles;  // (P,), room for most_tiles(P, frames)
  std::span<std::int64_t> vision_position_ids;               // (P, 2)
};

// How much of the buffers with room to spare is used, and the longest segments.
struct PackCounts {
  std::int64_t supervised, runs, tiles, vision_tiles, max_seqlen, vision_max_seqlen;
};

// The samples must have been measured, the buffers be as large as that says.
PackCounts assemble(const Samples& samples, const PackSize& size, const PackBuffers& out);

// What the host must know of a pack that the device assembles (mmpack/ops/assembly/assemble_sequence.py).
struct OutlineBuffers {
  std::span<std::int64_t> labels;             // (T,)
  std::span<std::int32_t> supervised_index;   // room for T - F
  std::span<std::int32_t> cu_seqlens;         // (S + 1,)
  std::span<std::int32_t> vision_cu_seqlens;  // (frames + 1,)
  std::span<std::int32_t> markers;            // (I,) the place of each in the samples' input_ids
};

// Like assemble, of the same arguments and with the same counts.
PackCounts outline(const Samples& samples, const PackSize& size, const OutlineBuffers& out);

// Rows [begin, end) of attention and of the segment they are in, most work first; returns how many.
// offsets (S + 1,) ascend from 0.
std::int64_t attention_tiles(std::span<const std::int32_t> offsets, bool causal,
                             std::span<std::int32_t> tiles);

constexpr std::int64_t most_tiles(std::int64_t rows, std::int64_t segments) {
  return segments + rows / kTile;
}

}  // namespace mmpack
