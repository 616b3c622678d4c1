#include "resize_kernels.h"

#include <algorithm>
#include <bit>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define MMPACK_AVX2 1
#include <immintrin.h>
#endif

namespace mmpack {

namespace {

constexpr std::int32_t kHalf = 1 << (kWeightBits - 1);

std::int32_t weight(const std::int16_t* high, const std::int16_t* low, std::int64_t tap) {
  return high[tap] * (1 << kLowBits) + low[tap];
}

std::uint8_t to_byte(std::int32_t sum) {
  return static_cast<std::uint8_t>(std::clamp(sum >> kWeightBits, 0, 255));
}

// In blocks whose sums stay in the nearest cache; the compiler vectorizes the loops over x.
void down_plain(const std::uint8_t* const* rows, const std::int16_t* high, const std::int16_t* low,
                std::int64_t taps, std::int64_t n, std::uint8_t* out) {
  constexpr std::int64_t kBlock = 512;
  std::int32_t sums[kBlock];
  for (std::int64_t begin = 0; begin < n; begin += kBlock) {
    const std::int64_t length = std::min(kBlock, n - begin);
    std::fill_n(sums, length, kHalf);
    for (std::int64_t t = 0; t < taps; ++t) {
      const std::int32_t k = weight(high, low, t);
      const std::uint8_t* row = rows[t] + begin;
      for (std::int64_t x = 0; x < length; ++x) sums[x] += row[x] * k;
    }
    for (std::int64_t x = 0; x < length; ++x) out[begin + x] = to_byte(sums[x]);
  }
}

void across_plain_from(const Across& rows, const Weights& weights, std::size_t begin) {
  for (std::size_t place = begin; place < weights.first.size(); ++place) {
    const std::int16_t* high = weights.high.data() + place * weights.taps;
    const std::int16_t* low = weights.low.data() + place * weights.taps;
    for (int r = 0; r < 2; ++r) {
      const std::uint8_t* pixels = rows.rows[r] + 4 * weights.first[place];
      std::int32_t sums[4] = {kHalf, kHalf, kHalf, kHalf};
      for (std::int64_t t = 0; t < weights.taps; ++t, pixels += 4) {
        const std::int32_t k = weight(high, low, t);
        for (int b = 0; b < 4; ++b) sums[b] += pixels[b] * k;
      }
      for (int b = 0; b < 4; ++b) {
        if (rows.planes[r][b]) rows.planes[r][b][place] = to_byte(sums[b]);
      }
    }
  }
}

void across_plain(const Across& rows, const Weights& weights) { across_plain_from(rows, weights, 0); }

#ifdef MMPACK_AVX2
#define AVX2 __attribute__((target("avx2")))

// Weights of two taps, next to each other as a multiply-add takes them, in all lanes.
AVX2 inline __m256i two_weights(const std::int16_t* weights) {
  std::int32_t two;
  std::memcpy(&two, weights, sizeof two);
  return _mm256_set1_epi32(two);
}

// 32-bit sums of both parts -> values before clipping to a byte.
AVX2 inline __m256i to_value(__m256i high, __m256i low) {
  return _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(high, kLowBits), low), kWeightBits);
}

AVX2 inline __m256i to_bytes(const __m256i* values) {  // of four registers, in their order per half
  return _mm256_packus_epi16(_mm256_packs_epi32(values[0], values[1]),
                             _mm256_packs_epi32(values[2], values[3]));
}

AVX2 void down_avx2(const std::uint8_t* const* rows, const std::int16_t* high, const std::int16_t* low,
                    std::int64_t taps, std::int64_t n, std::uint8_t* out) {
  constexpr std::int64_t kBytes = 32;
  if (n < kBytes) return down_plain(rows, high, low, taps, n, out);
  const __m256i zero = _mm256_setzero_si256();
  for (std::int64_t at = 0; at < n; at += kBytes) {
    const std::int64_t x = std::min(at, n - kBytes);  // the last block overlaps the one before
    __m256i highs[4] = {zero, zero, zero, zero}, lows[4];
    for (__m256i& sum : lows) sum = _mm256_set1_epi32(kHalf);
    for (std::int64_t t = 0; t < taps; t += 2) {
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[t] + x));
      const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[t + 1] + x));
      const __m256i first = _mm256_unpacklo_epi8(a, b), second = _mm256_unpackhi_epi8(a, b);
      const __m256i pairs[4] = {_mm256_unpacklo_epi8(first, zero), _mm256_unpackhi_epi8(first, zero),
                                _mm256_unpacklo_epi8(second, zero), _mm256_unpackhi_epi8(second, zero)};
      const __m256i k_high = two_weights(high + t), k_low = two_weights(low + t);
      for (int i = 0; i < 4; ++i) {
        highs[i] = _mm256_add_epi32(highs[i], _mm256_madd_epi16(pairs[i], k_high));
        lows[i] = _mm256_add_epi32(lows[i], _mm256_madd_epi16(pairs[i], k_low));
      }
    }
    __m256i values[4];
    for (int i = 0; i < 4; ++i) values[i] = to_value(highs[i], lows[i]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + x), to_bytes(values));
  }
}

// One place of two rows, a row per half of a register: the values of its four bytes.
template <std::int64_t Taps>
AVX2 inline __m256i one_place(const std::uint8_t* const* rows, const Weights& weights, std::size_t place) {
  const std::int64_t taps = Taps ? Taps : weights.taps;
  // Four pixels per half: bytes of the first two as pairs of 16 bits, then of the other two
  const __m256i front = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1));
  const __m256i back = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1));
  const std::int16_t* high = weights.high.data() + place * taps;
  const std::int16_t* low = weights.low.data() + place * taps;
  const std::uint8_t *a = rows[0] + 4 * weights.first[place], *b = rows[1] + 4 * weights.first[place];
  __m256i highs = _mm256_setzero_si256(), lows = _mm256_set1_epi32(kHalf);
  const auto add = [&](__m256i pairs, std::int64_t t) AVX2 {
    highs = _mm256_add_epi32(highs, _mm256_madd_epi16(pairs, two_weights(high + t)));
    lows = _mm256_add_epi32(lows, _mm256_madd_epi16(pairs, two_weights(low + t)));
  };
  std::int64_t t = 0;
  for (; t + 4 <= taps; t += 4) {
    const __m256i pixels = _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a + 4 * t))),
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + 4 * t)), 1);
    add(_mm256_shuffle_epi8(pixels, front), t);
    add(_mm256_shuffle_epi8(pixels, back), t + 2);
  }
  if (t < taps) {
    const __m256i pixels = _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(a + 4 * t))),
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(b + 4 * t)), 1);
    add(_mm256_shuffle_epi8(pixels, front), t);
  }
  return to_value(highs, lows);
}

template <std::int64_t Taps>
AVX2 void across_taps(const Across& rows, const Weights& weights) {
  const __m256i by_byte = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  std::size_t place = 0;
  for (; place + 4 <= weights.first.size(); place += 4) {
    __m256i values[4];
    for (int i = 0; i < 4; ++i) values[i] = one_place<Taps>(rows.rows, weights, place + i);
    alignas(32) std::uint8_t bytes[32];
    _mm256_store_si256(reinterpret_cast<__m256i*>(bytes),
                       _mm256_shuffle_epi8(to_bytes(values), by_byte));
    for (int r = 0; r < 2; ++r) {
      for (int b = 0; b < 4; ++b) {
        if (rows.planes[r][b]) std::memcpy(rows.planes[r][b] + place, bytes + 16 * r + 4 * b, 4);
      }
    }
  }
  across_plain_from(rows, weights, place);
}

AVX2 void across_avx2(const Across& rows, const Weights& weights) {
  switch (weights.taps) {  // known to the compiler for what shrinks up to two times
    case 2: return across_taps<2>(rows, weights);
    case 4: return across_taps<4>(rows, weights);
    case 6: return across_taps<6>(rows, weights);
    case 8: return across_taps<8>(rows, weights);
    default: return across_taps<0>(rows, weights);
  }
}
#undef AVX2
#endif

constexpr Kernels kKernels[] = {
#ifdef MMPACK_AVX2
    {"avx2", down_avx2, across_avx2},
#endif
    {"plain", down_plain, across_plain},
};

}  // namespace

std::span<const Kernels> resize_kernels() {
#ifdef MMPACK_AVX2
  static const bool has_avx2 = __builtin_cpu_supports("avx2");
  return std::span(kKernels).subspan(has_avx2 ? 0 : 1);
#else
  return kKernels;
#endif
}

}  // namespace mmpack
