// With pixel_bindings.cpp, the only files that include Python: check, release the GIL, call.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "array_checks.h"
#include "assembler.h"
#include "balance.h"
#include "planner.h"

namespace {

// The caller's output arrays, by name. None may share memory with another output or an input,
// because writing would change an input that is already checked.
class Outputs {
 public:
  explicit Outputs(const py::dict& arrays) : arrays_(arrays) {}

  template <typename T>
  void keep_apart(std::span<const T> values, const char* name) {
    const auto *begin = reinterpret_cast<const char*>(values.data()),
               *end = begin + values.size_bytes();
    const std::less<const char*> before;
    for (const auto& [other_begin, other_end] : taken_) {
      if (before(begin, other_end) && before(other_begin, end)) {
        refuse(std::string(name) + " must not share memory with another array");
      }
    }
    if (begin != end) taken_.emplace_back(begin, end);
  }

  template <typename T>
  std::span<T> take(const char* name, Shape shape) {
    const py::object item = arrays_.attr("get")(name);
    if (!py::isinstance<py::array>(item)) refuse(std::string(name) + " must be a numpy array");
    const py::array array = py::reinterpret_borrow<py::array>(item);
    const auto values = writable<T>(array, name, shape);
    keep_apart(std::span<const T>(values), name);
    return values;
  }

 private:
  const py::dict& arrays_;
  std::vector<std::pair<const char*, const char*>> taken_;
};

template <typename T>
py::array_t<T> to_numpy(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

void check_sizes(std::span<const std::int64_t> sizes, std::int64_t capacity, const char* name) {
  std::int64_t total = 0;
  for (const std::int64_t size : sizes) {
    if (size < 0 || size > capacity || size > kMost - total) {
      refuse(std::string(name) + " must lie in [0, " + std::to_string(capacity) +
             "], their sum in [0, 2^60], got " + std::to_string(size));
    }
    total += size;
  }
}

py::tuple plan(const py::array& num_tokens, std::int64_t capacity,
               const std::optional<py::array>& num_patches, std::int64_t patch_capacity,
               const std::optional<py::array>& costs, std::uint64_t seed) {
  using Values = std::span<const std::int64_t>;
  const Values tokens = view<std::int64_t>(num_tokens, "num_tokens", {kAny});
  const Shape shape = {static_cast<py::ssize_t>(tokens.size())};
  const Values patches = num_patches ? view<std::int64_t>(*num_patches, "num_patches", shape) : Values();
  const Values cost = costs ? view<std::int64_t>(*costs, "costs", shape) : Values();
  if (!num_patches) patch_capacity = 0;
  if (capacity < 1 || capacity > kMost || patch_capacity < 0 || patch_capacity > kMost) {
    refuse("capacities must be positive and at most 2^60");
  }
  mmpack::Plan plan;
  {
    py::gil_scoped_release release;
    check_sizes(tokens, capacity, "num_tokens");
    check_sizes(patches, patch_capacity, "num_patches");
    check_sizes(cost, kMost, "costs");
    if (costs && std::ranges::all_of(cost, [](std::int64_t c) { return c == 0; })) {
      refuse("costs must not all be zero");
    }
    const mmpack::Sizes sizes{tokens, capacity, patches, patch_capacity};
    plan = costs ? mmpack::balance(sizes, cost, seed) : mmpack::best_fit_decreasing(sizes, seed);
  }
  return py::make_tuple(to_numpy(plan.sample_index), to_numpy(plan.bin_offsets));
}

mmpack::Samples view_samples(const py::array& input_ids, const py::array& labels,
                             const py::array& offsets, const py::array& grid_thw,
                             const py::array& temporal_step, const py::array& grid_offsets,
                             const py::array& first_shown, std::int64_t image_id,
                             std::int64_t video_id, std::int64_t merge_size) {
  return {view<std::int32_t>(input_ids, "input_ids", {kAny}),
          view<std::int32_t>(labels, "labels", {kAny}),
          view<std::int32_t>(offsets, "offsets", {kAny}),
          view<std::int32_t>(grid_thw, "grid_thw", {kAny, 3}),
          view<float>(temporal_step, "temporal_step", {kAny}),
          view<std::int32_t>(grid_offsets, "grid_offsets", {kAny}),
          view<std::int32_t>(first_shown, "first_shown", {kAny}),
          image_id,
          video_id,
          merge_size};
}

py::tuple measure(const py::array& input_ids, const py::array& labels, const py::array& offsets,
                  const py::array& grid_thw, const py::array& temporal_step,
                  const py::array& grid_offsets, const py::array& first_shown,
                  std::int64_t image_id, std::int64_t video_id, std::int64_t merge_size) {
  const auto samples = view_samples(input_ids, labels, offsets, grid_thw, temporal_step,
                                    grid_offsets, first_shown, image_id, video_id, merge_size);
  const auto size = mmpack::measure(samples);
  return py::make_tuple(size.tokens, size.placeholders, size.features, size.frames, size.patches,
                        size.images, size.distinct,
                        size.image_features * merge_size * merge_size);
}

void keep_apart(Outputs& outputs, const mmpack::Samples& samples) {
  outputs.keep_apart(samples.input_ids, "input_ids");
  outputs.keep_apart(samples.labels, "labels");
  outputs.keep_apart(samples.offsets, "offsets");
  outputs.keep_apart(samples.grid_thw, "grid_thw");
  outputs.keep_apart(samples.temporal_step, "temporal_step");
  outputs.keep_apart(samples.grid_offsets, "grid_offsets");
  outputs.keep_apart(samples.first_shown, "first_shown");
}

py::tuple to_tuple(const mmpack::PackCounts& counts) {
  return py::make_tuple(counts.supervised, counts.runs, counts.tiles, counts.vision_tiles,
                        counts.max_seqlen, counts.vision_max_seqlen);
}

// The arrays of a pack that `assemble` writes: name, type, extents. mmpack/types.py has the same
// table for allocation (tests/test_native.py compares the two).
#define PACK_ARRAYS(ARRAY)                                                \
  ARRAY(input_ids, std::int64_t, T)                                       \
  ARRAY(labels, std::int64_t, T)                                          \
  ARRAY(position_ids, std::int64_t, 4, T)                                 \
  ARRAY(cu_seqlens, std::int32_t, S + 1)                                  \
  ARRAY(segment_ids, std::int32_t, T)                                     \
  ARRAY(tiles, std::int32_t, most_tiles(T, S), 4)                         \
  ARRAY(feature_index, std::int32_t, T)                                   \
  ARRAY(feature_token, std::int32_t, M)                                   \
  ARRAY(feature_offsets, std::int32_t, F + 1)                             \
  ARRAY(text_order, std::int32_t, T - M)                                  \
  ARRAY(text_id_offsets, std::int32_t, T - M + 1)                         \
  ARRAY(supervised_index, std::int32_t, T - M)                            \
  ARRAY(grid_thw, std::int64_t, I, 3)                                     \
  ARRAY(vision_index, std::int32_t, I)                                    \
  ARRAY(vision_grid_thw, std::int64_t, U, 3)                              \
  ARRAY(vision_cu_seqlens, std::int32_t, frames + 1)                      \
  ARRAY(vision_segment_ids, std::int32_t, P)                              \
  ARRAY(vision_tiles, std::int32_t, most_tiles(P, frames), 4)             \
  ARRAY(vision_position_ids, std::int64_t, P, 2)

py::tuple assemble(const py::array& input_ids, const py::array& labels, const py::array& offsets,
                   const py::array& grid_thw, const py::array& temporal_step,
                   const py::array& grid_offsets, const py::array& first_shown,
                   std::int64_t image_id, std::int64_t video_id, std::int64_t merge_size,
                   const py::dict& out) {
  const auto samples = view_samples(input_ids, labels, offsets, grid_thw, temporal_step,
                                    grid_offsets, first_shown, image_id, video_id, merge_size);
  const auto size = mmpack::measure(samples);
  using mmpack::most_tiles;
  const auto T = size.tokens, M = size.placeholders, F = size.features, U = size.distinct;
  const auto frames = size.frames, P = size.patches;
  const auto S = static_cast<std::int64_t>(samples.num_segments());
  const auto I = static_cast<std::int64_t>(samples.num_grids());
  Outputs outputs(out);
  keep_apart(outputs, samples);
#define TAKE(name, type, ...) .name = outputs.take<type>(#name, {__VA_ARGS__}),
  const mmpack::PackBuffers buffers{PACK_ARRAYS(TAKE)};
#undef TAKE
  mmpack::PackCounts counts;
  {
    py::gil_scoped_release release;
    counts = mmpack::assemble(samples, size, buffers);
  }
  return to_tuple(counts);
}

py::tuple outline(const py::array& input_ids, const py::array& labels, const py::array& offsets,
                  const py::array& grid_thw, const py::array& temporal_step,
                  const py::array& grid_offsets, const py::array& first_shown,
                  std::int64_t image_id, std::int64_t video_id, std::int64_t merge_size,
                  const py::dict& out) {
  const auto samples = view_samples(input_ids, labels, offsets, grid_thw, temporal_step,
                                    grid_offsets, first_shown, image_id, video_id, merge_size);
  const auto size = mmpack::measure(samples);
  const auto S = static_cast<std::int64_t>(samples.num_segments());
  const auto I = static_cast<std::int64_t>(samples.num_grids());
  Outputs outputs(out);
  keep_apart(outputs, samples);
  const mmpack::OutlineBuffers buffers{
      .labels = outputs.take<std::int64_t>("labels", {size.tokens}),
      .supervised_index =
          outputs.take<std::int32_t>("supervised_index", {size.tokens - size.placeholders}),
      .cu_seqlens = outputs.take<std::int32_t>("cu_seqlens", {S + 1}),
      .vision_cu_seqlens = outputs.take<std::int32_t>("vision_cu_seqlens", {size.frames + 1}),
      .markers = outputs.take<std::int32_t>("markers", {I}),
  };
  mmpack::PackCounts counts;
  {
    py::gil_scoped_release release;
    counts = mmpack::outline(samples, size, buffers);
  }
  return to_tuple(counts);
}

py::array_t<std::int32_t> attention_tiles(const py::array& offsets, bool causal) {
  const auto values = view<std::int32_t>(offsets, "offsets", {kAny});
  if (values.empty() || values.front() != 0 || !std::ranges::is_sorted(values)) {
    refuse("offsets must ascend from 0");
  }
  const auto segments = static_cast<std::int64_t>(values.size()) - 1;
  std::vector<std::int32_t> tiles(4 * mmpack::most_tiles(values.back(), segments));
  std::int64_t count;
  {
    py::gil_scoped_release release;
    count = mmpack::attention_tiles(values, causal, tiles);
  }
  return py::array_t<std::int32_t>({count, std::int64_t{4}}, tiles.data());
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "mmpack's C++ core; see csrc/.";
  m.attr("TILE") = mmpack::kTile;
  m.attr("MAX_RUN") = mmpack::kMaxRun;
  py::dict pack_arrays;
#define SAY(name, type, ...) \
  pack_arrays[#name] = py::make_tuple(py::str(py::dtype::of<type>()), #__VA_ARGS__);
  PACK_ARRAYS(SAY)
#undef SAY
  m.attr("PACK_ARRAYS") = pack_arrays;
  define_pixels(m);
  m.def("plan", &plan, py::arg("num_tokens"), py::arg("capacity"), py::arg("num_patches"),
        py::arg("patch_capacity"), py::arg("costs"), py::arg("seed"),
        "(sample_index (N,), bin_offsets (B + 1,)), int64; see csrc/planner.h and csrc/balance.h.");
  m.def("measure", &measure, py::arg("input_ids"), py::arg("labels"), py::arg("offsets"),
        py::arg("grid_thw"), py::arg("temporal_step"), py::arg("grid_offsets"),
        py::arg("first_shown"), py::arg("image_id"), py::arg("video_id"), py::arg("merge_size"),
        "(tokens, placeholders, features, frames, patches, images, distinct images and videos, image "
        "patches) of samples in a pack; see csrc/assembler.h.");
  m.def("assemble", &assemble, py::arg("input_ids"), py::arg("labels"), py::arg("offsets"),
        py::arg("grid_thw"), py::arg("temporal_step"), py::arg("grid_offsets"),
        py::arg("first_shown"), py::arg("image_id"), py::arg("video_id"), py::arg("merge_size"),
        py::arg("out"),
        "Writes a pack into the arrays of `out`; returns their used lengths and the longest segments: "
        "(supervised, runs, tiles, vision_tiles, max_seqlen, vision_max_seqlen). See csrc/assembler.h.");
  m.def("outline", &outline, py::arg("input_ids"), py::arg("labels"), py::arg("offsets"),
        py::arg("grid_thw"), py::arg("temporal_step"), py::arg("grid_offsets"),
        py::arg("first_shown"), py::arg("image_id"), py::arg("video_id"), py::arg("merge_size"),
        py::arg("out"),
        "Writes the host's part of a pack that the device assembles; returns values as `assemble`.");
  m.def("attention_tiles", &attention_tiles, py::arg("offsets"), py::arg("causal"),
        "(n, 4) int32; see csrc/assembler.h.");
}
