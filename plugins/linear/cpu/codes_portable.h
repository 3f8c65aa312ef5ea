// Codes and their sums in portable C++ with the vector extensions of GCC and Clang. Included by codes.h.
#pragma once

namespace slipstream {
namespace SLIPSTREAM_ISA {

typedef int32_t Pairs __attribute__((vector_size(32)));
typedef uint32_t UnsignedPairs __attribute__((vector_size(32)));
typedef int16_t Shorts __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
constexpr int kMaxTokens = 4;

template <class V>
inline V load_as(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
// 32 codes of 4 rows: vector q holds k = 4q..4q+3 of every row. Those of float4 are looked up.
template <int bits, bool float4>
struct Codes {
  Bytes quad[8];

  explicit Codes(const uint8_t* p) {
    for (int i = 0; i < bits; ++i) {
      const Bytes bytes = load_as<Bytes>(p + 64 * i);
      if constexpr (bits == 8) {
        quad[i] = bytes;
      } else {
        quad[2 * i] = bytes & 15;
        quad[2 * i + 1] = bytes >> 4;
      }
    }
    if constexpr (float4)
      for (Bytes& bytes : quad)
        for (int i = 0; i < 16; ++i) bytes[i] = kFloat4[bytes[i]];
  }

  // Quads first..last-1 alone, where half of them share a scale.
  Ints dot(const int8_t* x, Ints start, int first = 0, int last = 8) const {
    Pairs sum = {};
    for (int q = first; q < last; ++q) {
      const int16_t a = x[4 * q], b = x[4 * q + 1], c = x[4 * q + 2], d = x[4 * q + 3];
      // One product (at most 255*128) fits 16 bits; sums of two neighbours are taken in 32.
      const Shorts product =
          __builtin_convertvector(quad[q], Shorts) * Shorts{a, b, c, d, a, b, c, d, a, b, c, d, a, b, c, d};
      Pairs pair;
      __builtin_memcpy(&pair, &product, sizeof pair);
      const Pairs low = reinterpret_cast<Pairs>(reinterpret_cast<UnsignedPairs>(pair) << 16);
      sum += (pair >> 16) + (low >> 16);
    }
    return start + Ints{sum[0] + sum[1], sum[2] + sum[3], sum[4] + sum[5], sum[6] + sum[7]};
  }

  // The sum of each row's codes, each less its zero point.
  Ints sum_less(Ints zero_point, int first = 0, int last = 8) const {
    Shorts sum = {};
    for (int q = first; q < last; ++q) sum += __builtin_convertvector(quad[q], Shorts);
    Pairs pairs;
    __builtin_memcpy(&pairs, &sum, sizeof pairs);
    const Pairs both = (pairs & 0xffff) + (pairs >> 16);
    return Ints{both[0] + both[1], both[2] + both[3], both[4] + both[5], both[6] + both[7]} - zero_point * (4 * (last - first));
  }
};

// The bits of a float as an integer of the same order, and back; a NaN lies beyond the infinity of its sign.
inline int32_t ordered(int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); }

// The extremes of 32 values; a NaN or an infinity among them makes high - low a NaN or an infinity.
inline Range range_of(const float* x) {
  int32_t low = ordered(load_as<int32_t>(x)), high = low;
  for (int i = 1; i < 32; ++i) {
    const int32_t value = ordered(load_as<int32_t>(x + i));
    low = value < low ? value : low;
    high = value > high ? value : high;
  }
  low = ordered(low);
  high = ordered(high);
  return {load_as<float>(&low), load_as<float>(&high)};
}

// Rounds 32 values (x - low) * inverse, all within 0..255, less 128, to int8; returns their sum.
inline int32_t quantize_block(const float* x, float low, float inverse, int8_t* codes) {
  int32_t sum = 0;
  for (int i = 0; i < 32; ++i) {
    const int32_t q = int32_t(std::nearbyint((x[i] - low) * inverse)) - 128;
    codes[i] = int8_t(q);
    sum += q;
  }
  return sum;
}

// In double, so that the result does not depend on the order.
inline double sum_of_squares(const float* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += double(x[i]) * x[i];
  return sum;
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
