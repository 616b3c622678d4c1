// The only file that includes Python: check, release the GIL, call.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "planner.h"

namespace py = pybind11;

namespace {

using Int64Array = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>;

std::span<const std::int64_t> view(const Int64Array& array, const char* name) {
  if (array.ndim() != 1) throw std::invalid_argument(std::string(name) + " must have one dimension");
  return {array.data(), static_cast<std::size_t>(array.size())};
}

void check_sizes(std::span<const std::int64_t> sizes, std::int64_t capacity, const char* name) {
  for (const std::int64_t size : sizes) {
    if (size < 0 || size > capacity) {
      throw std::invalid_argument(std::string(name) + " must lie in [0, " + std::to_string(capacity) +
                                  "], got " + std::to_string(size));
    }
  }
}

Int64Array to_numpy(const std::vector<std::int64_t>& values) {
  return Int64Array(static_cast<py::ssize_t>(values.size()), values.data());
}

py::tuple best_fit_decreasing(const Int64Array& num_tokens, std::int64_t capacity,
                              const std::optional<Int64Array>& num_patches,
                              std::int64_t patch_capacity, std::uint64_t seed) {
  const auto tokens = view(num_tokens, "num_tokens");
  const auto patches = num_patches ? view(*num_patches, "num_patches") : std::span<const std::int64_t>();
  if (num_patches && patches.size() != tokens.size()) {
    throw std::invalid_argument("num_tokens and num_patches must be of one length");
  }
  mmpack::Plan plan;
  {
    py::gil_scoped_release release;
    check_sizes(tokens, capacity, "num_tokens");
    check_sizes(patches, patch_capacity, "num_patches");
    plan = mmpack::best_fit_decreasing(tokens, capacity, patches, patch_capacity, seed);
  }
  return py::make_tuple(to_numpy(plan.sample_index), to_numpy(plan.bin_offsets));
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "mmpack's C++ core; see csrc/.";
  m.def("best_fit_decreasing", &best_fit_decreasing, py::arg("num_tokens"), py::arg("capacity"),
        py::arg("num_patches"), py::arg("patch_capacity"), py::arg("seed"),
        "(sample_index (N,), bin_offsets (B + 1,)), int64; see csrc/planner.h.");
}
