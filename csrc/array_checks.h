// Checks of the arrays that Python passes; for the two files of bindings.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <stdexcept>
#include <string>

namespace py = pybind11;

inline constexpr std::int64_t kMost = std::int64_t{1} << 60;  // limit of sums over all samples
inline constexpr py::ssize_t kAny = -1;                       // any extent

using Shape = std::initializer_list<py::ssize_t>;

[[noreturn]] inline void refuse(const std::string& message) { throw std::invalid_argument(message); }

inline bool has_shape(const py::array& array, Shape shape) {
  return std::equal(shape.begin(), shape.end(), array.shape(), array.shape() + array.ndim(),
                    [](py::ssize_t wanted, py::ssize_t is) { return wanted == kAny || wanted == is; });
}

inline std::string to_text(Shape shape) {
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

// Defines the entry points for pixels.
void define_pixels(py::module_& m);
