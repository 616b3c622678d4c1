// The entry points for pixels: check, release the GIL, call.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "array_checks.h"
#include "patchify.h"
#include "resize.h"

namespace {

constexpr std::int64_t kMostPixels = std::int64_t{1} << 20;   // per side
constexpr std::int64_t kMostScratch = std::int64_t{1} << 32;  // bytes

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

}  // namespace

void define_pixels(py::module_& m) {
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
}
