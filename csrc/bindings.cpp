// The only file that includes Python: check, release the GIL, call.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "assembler.h"
#include "balance.h"
#include "patchify.h"
#include "planner.h"
#include "resize.h"

namespace py = pybind11;

namespace {

constexpr std::int64_t kMost = std::int64_t{1} << 60;  // limit of sums over all samples
constexpr py::ssize_t kAny = -1;                       // any extent

constexpr std::int64_t kMostPixels = std::int64_t{1} << 20;  // per side
constexpr std::int64_t kMostScratch = std::int64_t{1} << 32;  // bytes

using Shape = std::initializer_list<py::ssize_t>;

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

bool has_shape(const py::array& array, Shape shape) {
  return std::equal(shape.begin(), shape.end(), array.shape(), array.shape() + array.ndim(),
                    [](py::ssize_t wanted, py::ssize_t is) { return wanted == kAny || wanted == is; });
}

std::string to_text(Shape shape) {
  std::string text;
  for (const py::ssize_t extent : shape) {
    text += (text.empty() ? "" : ", ") + (extent == kAny ? "any" : std::to_string(extent));
  }
  return "(" + text + ")";
}

// The elements of an array, which must have this type and shape; nothing is converted.
template <typename T>
std::span<const T> view(const py::array& array, const char* name, Shape shape) {
  if (!py::isinstance<py::array_t<T>>(array) || !has_shape(array, shape)) {
    refuse(std::string(name) + " must be " + std::string(py::str(py::dtype::of<T>())) + " of shape " +
           to_text(shape) + ", got " + std::string(py::str(array.dtype())) + " of shape " +
           std::string(py::str(array.attr("shape"))));
  }
  constexpr int kPlain = int{py::array::c_style} | int{py::detail::npy_api::NPY_ARRAY_ALIGNED_};
  if ((array.flags() & kPlain) != kPlain) {
    refuse(std::string(name) + " must be contiguous and aligned");
  }
  return {static_cast<const T*>(array.data()), static_cast<std::size_t>(array.size())};
}

template <typename T>
std::span<T> writable(const py::array& array, const char* name, Shape shape) {
  const auto values = view<T>(array, name, shape);
  if (!array.writeable()) refuse(std::string(name) + " must be writable");
  return {const_cast<T*>(values.data()), values.size()};
}

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

void patchify(const py::array& pixels, std::int64_t patch, std::int64_t merge,
              const py::array& patches, std::int64_t frame) {
  if (!py::isinstance<py::array_t<std::uint8_t>>(pixels) || pixels.ndim() != 3)
    refuse("pixels must be uint8 (height, width, channels)");
  if (patch < 1 || merge < 1 || patch > kMostPixels || merge > kMostPixels)
    refuse("patch and merge must be positive numbers of pixels and patches");
  const std::int64_t height = pixels.shape(0), width = pixels.shape(1), channels = pixels.shape(2);
  if (channels < 1 || channels > kMost / (patch * patch))
    refuse("pixels must have channels, and a patch of them at most 2^60 bytes, got " +
           std::to_string(channels) + " channels");
  const std::int64_t block = patch * merge;
  if (height % block || width % block) {
    refuse("height and width of pixels must be multiples of " + std::to_string(block) + ", got " +
           std::to_string(height) + " x " + std::to_string(width));
  }
  const std::int64_t values = channels * patch * patch;
  const std::int64_t frames =
      std::max(patches.ndim() == 2 ? patches.shape(1) / values : 0, std::int64_t{1});
  if (frame < 0 || frame >= frames)
    refuse("frame must be from 0 to " + std::to_string(frames - 1) +
           ", the frames that patches have room for");
  const mmpack::PatchGrid grid{height / patch, width / patch, patch, merge, frames, frame};
  const auto stride = [&](int axis) {  // an axis of length 1 may have any stride
    return pixels.shape(axis) > 1 ? pixels.strides(axis) : 0;
  };
  const mmpack::Picture picture{static_cast<const std::uint8_t*>(pixels.data()), stride(0),
                                stride(1), stride(2), channels};
  const auto out = writable<std::uint8_t>(patches, "patches",
                                          {grid.grid_h * grid.grid_w, frames * values});
  if (out.empty()) return;
  py::gil_scoped_release release;
  mmpack::patchify(picture, grid, out.data());
}

void resize(const py::array& pixels, std::int64_t patch, std::int64_t merge, const py::array& patches,
            std::int64_t frame, bool vertical_first, const std::string& kernel) {
  const std::int64_t pixel_bytes = pixels.ndim() == 2 ? 1 : 4;
  const auto bytes = pixel_bytes == 1 ? view<std::uint8_t>(pixels, "pixels", {kAny, kAny})
                                      : view<std::uint8_t>(pixels, "pixels", {kAny, kAny, 4});
  if (patch < 1 || merge < 1 || patch > kMostPixels || merge > kMostPixels)
    refuse("patch and merge must be positive numbers of pixels and patches");
  const mmpack::Source source{bytes.data(), pixels.shape(0), pixels.shape(1), pixel_bytes};
  if (source.height < 1 || source.width < 1 || source.height > kMostPixels || source.width > kMostPixels)
    refuse("pixels must have sides of 1 to 2^20, got " + std::to_string(source.height) + " x " +
           std::to_string(source.width));
  if (patches.ndim() != 4)
    refuse("patches must be of shape (grid height, grid width, channels, values of a channel)");
  const std::int64_t grid_h = patches.shape(0), grid_w = patches.shape(1), area = patch * patch;
  if (grid_h < 1 || grid_w < 1 || grid_h % merge || grid_w % merge || grid_h > kMostPixels / patch ||
      grid_w > kMostPixels / patch)
    refuse("patches must be a grid of multiples of " + std::to_string(merge) +
           ", at most 2^20 pixels per side, got " + std::to_string(grid_h) + " x " +
           std::to_string(grid_w));
  const std::int64_t frames = std::max(patches.shape(3) / area, py::ssize_t{1});
  if (frame < 0 || frame >= frames)
    refuse("frame must be from 0 to " + std::to_string(frames - 1) +
           ", the frames that patches have room for");
  const auto out = writable<std::uint8_t>(patches, "patches", {grid_h, grid_w, 3, frames * area});
  const std::less<const std::uint8_t*> before;
  if (before(bytes.data(), out.data() + out.size()) && before(out.data(), bytes.data() + bytes.size()))
    refuse("patches must not share memory with pixels");
  const auto kernels = mmpack::resize_kernels();
  const auto chosen = kernel.empty() ? kernels.begin() : std::ranges::find(kernels, kernel, &mmpack::Kernels::name);
  if (chosen == kernels.end()) refuse("kernel must be one of RESIZE_KERNELS, got '" + kernel + "'");
  const mmpack::PatchGrid grid{grid_h, grid_w, patch, merge, frames, frame};
  if (mmpack::resize_scratch(source, grid, vertical_first) > kMostScratch)
    refuse("a resize may take 4 GiB for rows between its passes; pixels are " +
           std::to_string(source.height) + " x " + std::to_string(source.width) + ", patches " +
           std::to_string(grid_h * patch) + " x " + std::to_string(grid_w * patch));
  py::gil_scoped_release release;
  mmpack::resize(source, grid, vertical_first, *chosen, out.data());
}

// The Arrow C data interface, as https://arrow.apache.org/docs/format/CDataInterface.html defines it.
struct ArrowSchema {
  const char* format;
  const char* name;
  const char* metadata;
  std::int64_t flags;
  std::int64_t n_children;
  ArrowSchema** children;
  ArrowSchema* dictionary;
  void (*release)(ArrowSchema*);
  void* private_data;
};

struct ArrowArray {
  std::int64_t length;
  std::int64_t null_count;
  std::int64_t offset;
  std::int64_t n_buffers;
  std::int64_t n_children;
  const void** buffers;
  ArrowArray** children;
  ArrowArray* dictionary;
  void (*release)(ArrowArray*);
  void* private_data;
};

// The pixels behind what Pillow's __arrow_c_array__ returns, without a copy: (height, width) of a
// grey image, else (height, width, 4). They stay valid while the array lives.
py::array arrow_pixels(const py::object& schema, const py::object& array, py::ssize_t height,
                       py::ssize_t width) {
  if (!PyCapsule_IsValid(schema.ptr(), "arrow_schema")) refuse("schema must be an arrow_schema capsule");
  if (!PyCapsule_IsValid(array.ptr(), "arrow_array")) refuse("array must be an arrow_array capsule");
  if (height < 1 || width < 1 || height > kMostPixels || width > kMostPixels)
    refuse("height and width must be from 1 to 2^20");
  const auto* type = static_cast<ArrowSchema*>(PyCapsule_GetPointer(schema.ptr(), "arrow_schema"));
  const auto* values = static_cast<ArrowArray*>(PyCapsule_GetPointer(array.ptr(), "arrow_array"));
  if (!type->release || !values->release) refuse("schema and array must not be released");
  const std::string format = type->format;
  const py::ssize_t pixel_bytes = format == "C" ? 1 : 4;
  if (values->length != height * width || values->offset || values->null_count)
    refuse("array must have height times width pixels, got " + std::to_string(values->length));
  if (pixel_bytes == 4) {
    if (format != "+w:4" || type->n_children != 1 || values->n_children != 1 ||
        std::string(type->children[0]->format) != "C")
      refuse("schema must be of bytes or of four bytes, got " + format);
    values = values->children[0];
    if (values->length != 4 * height * width || values->offset || values->null_count)
      refuse("array must have four bytes per pixel");
  }
  if (values->n_buffers != 2 || !values->buffers[1]) refuse("array must have pixels");
  std::vector<py::ssize_t> shape{height, width};
  if (pixel_bytes == 4) shape.push_back(4);
  py::array pixels(py::dtype::of<std::uint8_t>(), shape, values->buffers[1], array);
  pixels.attr("setflags")(py::arg("write") = false);
  return pixels;
}

void normalize(const py::array& patches, const py::array& table, std::int64_t frames,
               const py::array& values) {
  const auto bytes = view<std::uint8_t>(patches, "patches", {kAny, kAny});
  const auto floats = view<float>(table, "table", {kAny, 256});
  const py::ssize_t num_patches = patches.shape(0), width = patches.shape(1);
  const py::ssize_t channels = table.shape(0);
  if (!channels || width % channels) refuse("patches must have the same number of bytes per channel");
  if (frames < 1 || frames > kMostPixels) refuse("frames must be positive");
  if (width > kMost / frames)
    refuse("patches times frames must be at most 2^60 values wide, got " + std::to_string(width) +
           " x " + std::to_string(frames));
  const auto out = writable<float>(values, "values", {num_patches, width * frames});
  if (out.empty()) return;
  py::gil_scoped_release release;
  mmpack::normalize(bytes.data(), num_patches, channels, width / channels, frames, floats.data(),
                    out.data());
}

mmpack::Samples view_samples(const py::array& input_ids, const py::array& labels,
                             const py::array& offsets, const py::array& grid_thw,
                             const py::array& temporal_step, const py::array& grid_offsets,
                             std::int64_t image_id, std::int64_t video_id, std::int64_t merge_size) {
  return {view<std::int32_t>(input_ids, "input_ids", {kAny}),
          view<std::int32_t>(labels, "labels", {kAny}),
          view<std::int32_t>(offsets, "offsets", {kAny}),
          view<std::int32_t>(grid_thw, "grid_thw", {kAny, 3}),
          view<float>(temporal_step, "temporal_step", {kAny}),
          view<std::int32_t>(grid_offsets, "grid_offsets", {kAny}),
          image_id,
          video_id,
          merge_size};
}

py::tuple measure(const py::array& input_ids, const py::array& labels, const py::array& offsets,
                  const py::array& grid_thw, const py::array& temporal_step,
                  const py::array& grid_offsets, std::int64_t image_id, std::int64_t video_id,
                  std::int64_t merge_size) {
  const auto samples = view_samples(input_ids, labels, offsets, grid_thw, temporal_step,
                                    grid_offsets, image_id, video_id, merge_size);
  const auto size = mmpack::measure(samples);
  return py::make_tuple(size.tokens, size.features, size.frames, size.patches, size.images,
                        size.image_features * merge_size * merge_size);
}

void keep_apart(Outputs& outputs, const mmpack::Samples& samples) {
  outputs.keep_apart(samples.input_ids, "input_ids");
  outputs.keep_apart(samples.labels, "labels");
  outputs.keep_apart(samples.offsets, "offsets");
  outputs.keep_apart(samples.grid_thw, "grid_thw");
  outputs.keep_apart(samples.temporal_step, "temporal_step");
  outputs.keep_apart(samples.grid_offsets, "grid_offsets");
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
  ARRAY(feature_token, std::int32_t, F)                                   \
  ARRAY(text_order, std::int32_t, T - F)                                  \
  ARRAY(text_id_offsets, std::int32_t, T - F + 1)                         \
  ARRAY(supervised_index, std::int32_t, T - F)                            \
  ARRAY(grid_thw, std::int64_t, I, 3)                                     \
  ARRAY(vision_cu_seqlens, std::int32_t, frames + 1)                      \
  ARRAY(vision_segment_ids, std::int32_t, P)                              \
  ARRAY(vision_tiles, std::int32_t, most_tiles(P, frames), 4)             \
  ARRAY(vision_position_ids, std::int64_t, P, 2)

py::tuple assemble(const py::array& input_ids, const py::array& labels, const py::array& offsets,
                   const py::array& grid_thw, const py::array& temporal_step,
                   const py::array& grid_offsets, std::int64_t image_id, std::int64_t video_id,
                   std::int64_t merge_size, const py::dict& out) {
  const auto samples = view_samples(input_ids, labels, offsets, grid_thw, temporal_step,
                                    grid_offsets, image_id, video_id, merge_size);
  const auto size = mmpack::measure(samples);
  using mmpack::most_tiles;
  const auto T = size.tokens, F = size.features, frames = size.frames, P = size.patches;
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
                  const py::array& grid_offsets, std::int64_t image_id, std::int64_t video_id,
                  std::int64_t merge_size, const py::dict& out) {
  const auto samples = view_samples(input_ids, labels, offsets, grid_thw, temporal_step,
                                    grid_offsets, image_id, video_id, merge_size);
  const auto size = mmpack::measure(samples);
  const auto S = static_cast<std::int64_t>(samples.num_segments());
  const auto I = static_cast<std::int64_t>(samples.num_grids());
  Outputs outputs(out);
  keep_apart(outputs, samples);
  const mmpack::OutlineBuffers buffers{
      .labels = outputs.take<std::int64_t>("labels", {size.tokens}),
      .supervised_index =
          outputs.take<std::int32_t>("supervised_index", {size.tokens - size.features}),
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
  m.def("patchify", &patchify, py::arg("pixels"), py::arg("patch"), py::arg("merge"),
        py::arg("patches"), py::arg("frame") = 0,
        "Writes one picture as a frame of patches; see csrc/patchify.h.");
  py::list kernel_names;
  for (const mmpack::Kernels& kernels : mmpack::resize_kernels()) kernel_names.append(kernels.name);
  m.attr("RESIZE_KERNELS") = py::tuple(kernel_names);
  m.def("resize", &resize, py::arg("pixels"), py::arg("patch"), py::arg("merge"), py::arg("patches"),
        py::arg("frame") = 0, py::arg("vertical_first") = false, py::arg("kernel") = "",
        "Resizes one picture as Pillow does and writes it as a frame of patches; see csrc/resize.h.");
  m.def("arrow_pixels", &arrow_pixels, py::arg("schema"), py::arg("array"), py::arg("height"),
        py::arg("width"), "The pixels of an image that Pillow exports, without a copy.");
  m.def("normalize", &normalize, py::arg("patches"), py::arg("table"), py::arg("frames"),
        py::arg("values"), "Converts bytes to floats by a table; see csrc/patchify.h.");
  m.def("plan", &plan, py::arg("num_tokens"), py::arg("capacity"), py::arg("num_patches"),
        py::arg("patch_capacity"), py::arg("costs"), py::arg("seed"),
        "(sample_index (N,), bin_offsets (B + 1,)), int64; see csrc/planner.h and csrc/balance.h.");
  m.def("measure", &measure, py::arg("input_ids"), py::arg("labels"), py::arg("offsets"),
        py::arg("grid_thw"), py::arg("temporal_step"), py::arg("grid_offsets"), py::arg("image_id"),
        py::arg("video_id"), py::arg("merge_size"),
        "(tokens, features, frames, patches, images, image patches) of samples in a pack; see "
        "csrc/assembler.h.");
  m.def("assemble", &assemble, py::arg("input_ids"), py::arg("labels"), py::arg("offsets"),
        py::arg("grid_thw"), py::arg("temporal_step"), py::arg("grid_offsets"), py::arg("image_id"),
        py::arg("video_id"), py::arg("merge_size"), py::arg("out"),
        "Writes a pack into the arrays of `out`; returns their used lengths and the longest segments: "
        "(supervised, runs, tiles, vision_tiles, max_seqlen, vision_max_seqlen). See csrc/assembler.h.");
  m.def("outline", &outline, py::arg("input_ids"), py::arg("labels"), py::arg("offsets"),
        py::arg("grid_thw"), py::arg("temporal_step"), py::arg("grid_offsets"), py::arg("image_id"),
        py::arg("video_id"), py::arg("merge_size"), py::arg("out"),
        "Writes the host's part of a pack that the device assembles; returns values as `assemble`.");
  m.def("attention_tiles", &attention_tiles, py::arg("offsets"), py::arg("causal"),
        "(n, 4) int32; see csrc/assembler.h.");
}
