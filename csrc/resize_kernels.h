// The inner loops of a resize, one set per instruction set; all give the same bytes.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace mmpack {

// Weights are integers of 22 bits. A weight is high * 2^11 + low, so that 16-bit multiply-adds of
// bytes give the exact 32-bit sum: (sum of high * byte) * 2^11 + (sum of low * byte).
inline constexpr int kWeightBits = 22;
inline constexpr int kLowBits = 11;

// One axis of a resize: place number i of the output is the weighted sum of `taps` inputs from
// first[i] on. taps is even, and first never decreases. Weights of inputs behind the end are 0.
struct Weights {
  std::int64_t taps;
  std::vector<std::int64_t> first;
  std::vector<std::int16_t> high, low;  // taps per place
};

// Two rows of pixels of four bytes, each as planes: byte b of a row's pixels -> planes[row][b],
// `places` bytes; a null plane is not written. A row has at least first + taps pixels.
struct Across {
  const std::uint8_t* rows[2];
  std::uint8_t* planes[2][4];
};

struct Kernels {
  const char* name;
  // Bytes [0, n) of `out` = the weighted sums of the bytes of `taps` rows.
  void (*down)(const std::uint8_t* const* rows, const std::int16_t* high, const std::int16_t* low,
               std::int64_t taps, std::int64_t n, std::uint8_t* out);
  void (*across)(const Across& rows, const Weights& weights);
};

// Those that this machine runs, the fastest first; the last one is plain C++.
std::span<const Kernels> resize_kernels();

}  // namespace mmpack
