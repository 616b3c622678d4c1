// The only file that includes Python: check, release the GIL, call.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "balance.h"
#include "patchify.h"
#include "planner.h"

namespace py = pybind11;

namespace {

using Int64Array = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>;

constexpr std::int64_t kMostPixels = std::int64_t{1} << 20;  // of a side
constexpr std::int64_t kMostCost = std::int64_t{1} << 62;  // of all samples together

std::span<const std::int64_t> view(const Int64Array& array, const char* name) {
  if (array.ndim() != 1)
    throw std::invalid_argument(std::string(name) + " must have one dimension");
  return {array.data(), static_cast<std::size_t>(array.size())};
}

void check_sizes(std::span<const std::int64_t> sizes, std::int64_t capacity, const char* name) {
  for (const std::int64_t size : sizes) {
    if (size < 0 || size > capacity) {
      throw std::invalid_argument(std::string(name) + " must lie in [0, " +
                                  std::to_string(capacity) + "], got " + std::to_string(size));
    }
  }
}

Int64Array to_numpy(const std::vector<std::int64_t>& values) {
  return Int64Array(static_cast<py::ssize_t>(values.size()), values.data());
}

py::tuple plan(const Int64Array& num_tokens, std::int64_t capacity,
               const std::optional<Int64Array>& num_patches, std::int64_t patch_capacity,
               const std::optional<Int64Array>& costs, std::uint64_t seed) {
  const auto tokens = view(num_tokens, "num_tokens");
  const auto patches =
      num_patches ? view(*num_patches, "num_patches") : std::span<const std::int64_t>();
  const auto cost = costs ? view(*costs, "costs") : std::span<const std::int64_t>();
  if (num_patches && patches.size() != tokens.size()) {
    throw std::invalid_argument("num_tokens and num_patches must be of one length");
  }
  if (costs && cost.size() != tokens.size()) {
    throw std::invalid_argument("num_tokens and costs must be of one length");
  }
  if (!num_patches) patch_capacity = 0;
  mmpack::Plan plan;
  {
    py::gil_scoped_release release;
    check_sizes(tokens, capacity, "num_tokens");
    check_sizes(patches, patch_capacity, "num_patches");
    std::int64_t total = 0;
    for (const std::int64_t c : cost) {
      if (c < 0 || c > kMostCost - total)
        throw std::invalid_argument("costs must lie in [0, 2^62], their sum too");
      total += c;
    }
    const mmpack::Sizes sizes{tokens, capacity, patches, patch_capacity};
    plan = costs ? mmpack::balance(sizes, cost, seed) : mmpack::best_fit_decreasing(sizes, seed);
  }
  return py::make_tuple(to_numpy(plan.sample_index), to_numpy(plan.bin_offsets));
}

void patchify(const py::array& pixels, std::int64_t patch, std::int64_t merge,
              const py::array& patches) {
  const auto is_bytes = [](const py::array& array) {
    return array.dtype().kind() == 'u' && array.itemsize() == 1;
  };
  if (!is_bytes(pixels) || pixels.ndim() != 3)
    throw std::invalid_argument("pixels must be uint8 (height, width, channels)");
  if (patch < 1 || merge < 1 || patch > kMostPixels || merge > kMostPixels)
    throw std::invalid_argument("patch and merge must be positive pixels and patches");
  const std::int64_t height = pixels.shape(0), width = pixels.shape(1), channels = pixels.shape(2);
  const std::int64_t block = patch * merge;
  if (height % block || width % block) {
    throw std::invalid_argument("pixels of " + std::to_string(height) + " x " +
                                std::to_string(width) + " are no multiple of " +
                                std::to_string(block));
  }
  const mmpack::PatchGrid grid{height / patch, width / patch, patch, merge};
  if (!is_bytes(patches) || patches.ndim() != 2 || patches.shape(0) != grid.grid_h * grid.grid_w ||
      patches.shape(1) != channels * patch * patch) {
    throw std::invalid_argument("patches must be uint8 (" + std::to_string(grid.grid_h * grid.grid_w) +
                                ", " + std::to_string(channels * patch * patch) + ")");
  }
  if (!patches.writeable() || !(patches.flags() & py::array::c_style))
    throw std::invalid_argument("patches must be contiguous and writeable");
  const mmpack::Picture picture{static_cast<const std::uint8_t*>(pixels.data()), pixels.strides(0),
                                pixels.strides(1), pixels.strides(2), channels};
  auto* out = static_cast<std::uint8_t*>(py::array(patches).mutable_data());
  py::gil_scoped_release release;
  mmpack::patchify(picture, grid, out);
}

void normalize(const py::array& patches, const py::array& table, std::int64_t frames,
               const py::array& values) {
  const auto is = [](const py::array& array, char kind, py::ssize_t itemsize) {
    return array.dtype().kind() == kind && array.itemsize() == itemsize &&
           (array.flags() & py::array::c_style);
  };
  if (!is(patches, 'u', 1) || patches.ndim() != 2)
    throw std::invalid_argument("patches must be contiguous uint8 (P, C * p * p)");
  if (!is(table, 'f', 4) || table.ndim() != 2 || table.shape(1) != 256 || table.shape(0) < 1)
    throw std::invalid_argument("table must be contiguous float32 (C, 256)");
  const std::int64_t channels = table.shape(0), pixels = patches.shape(1) / channels;
  if (patches.shape(1) % channels)
    throw std::invalid_argument("patches must hold equally many bytes of every channel");
  if (frames < 1 || frames > kMostPixels) throw std::invalid_argument("frames must be positive");
  if (!is(values, 'f', 4) || values.ndim() != 2 || values.shape(0) != patches.shape(0) ||
      values.shape(1) != patches.shape(1) * frames || !values.writeable()) {
    throw std::invalid_argument(
        "values must be contiguous, writeable float32 (P, C * frames * p * p)");
  }
  const auto* bytes = static_cast<const std::uint8_t*>(patches.data());
  const auto* floats = static_cast<const float*>(table.data());
  auto* out = static_cast<float*>(py::array(values).mutable_data());
  const std::int64_t num_patches = patches.shape(0);
  py::gil_scoped_release release;
  mmpack::normalize(bytes, num_patches, channels, pixels, frames, floats, out);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "mmpack's C++ core; see csrc/.";
  m.def("patchify", &patchify, py::arg("pixels"), py::arg("patch"), py::arg("merge"),
        py::arg("patches"), "Writes the patches of one picture; see csrc/patchify.h.");
  m.def("normalize", &normalize, py::arg("patches"), py::arg("table"), py::arg("frames"),
        py::arg("values"), "Writes bytes as a table's floats; see csrc/patchify.h.");
  m.def("plan", &plan, py::arg("num_tokens"), py::arg("capacity"), py::arg("num_patches"),
        py::arg("patch_capacity"), py::arg("costs"), py::arg("seed"),
        "(sample_index (N,), bin_offsets (B + 1,)), int64; see csrc/planner.h and csrc/balance.h.");
}
