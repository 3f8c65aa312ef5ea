// The right-hand matrix of a product: panels of rows, as pages hold them, or copies of them in strips of columns.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/simd.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace attention {

using simd::kLanes;
using simd::Floats;

// Columns that are multiplied together.
constexpr int kStrip = 2 * kLanes;
// Whether copies of panels are in strips. Strips of AVX-512 are whole rows of a page of keys, or half of a head's
// values: not seen to gain.
constexpr bool kInStrips = simd::kRegisters == 16;

// What a row of b is multiplied by, and the sums of a vector of columns: floats, or pairs of integers whose products
// are exact.
template <class T>
struct Product {
  using Left = float;
  using Sums = Floats;
};
template <>
struct Product<Pair16> {
  using Left = Pair16;
  using Sums = simd::Ints;
};
template <>
struct Product<Pair8> : Product<Pair16> {};

template <class T>
using Left = typename Product<T>::Left;

// Numbers of an element, along the axis that is added up.
template <class T>
constexpr int64_t kPack = std::is_same_v<Left<T>, Pair16> ? 2 : 1;

// The right-hand matrix: `depth` rows, `panel_depth` of them in each panel, `stride` elements apart.
template <class T, class Next>
struct Panels {
  using Element = T;
  using Ahead = Next;
  static constexpr bool in_strips = false;
  const T* const* data;
  const Next* const* ahead;  // panels to bring to the second-level cache meanwhile, an element for each that is read
  int64_t panel_depth;
  int64_t depth;
  int64_t stride;
  // Further panels of elements as wide as T, a line of them for every other row: where those ahead are narrower, less
  // than memory could bring would be fetched here, and too much where the next keys are fetched beside narrow values.
  const T* const* after = nullptr;

  const T* panel(int64_t i, int64_t column) const { return data[i] + column; }
  // While b is read by blocks of `width` columns through all panels, those ahead are asked for from front to back:
  // memory gives more in this order than a line here and there. A run that crosses the end of one goes on behind it.
  const char* panel_ahead(int64_t i, int64_t column, int64_t width) const {
    const int64_t done = column * depth + i * panel_depth * width, elements = panel_depth * stride;
    return reinterpret_cast<const char*>(ahead[done / elements] + done % elements);
  }
};

// The same, copied so that every strip of columns of all panels is read from front to back.
template <class T>
struct Strips {
  using Element = T;
  static constexpr bool in_strips = true;
  static constexpr int64_t stride = kStrip;
  const T* data;
  int64_t strip_depth;  // rows from one strip to the next
  int64_t depth;
  int64_t panel_depth = depth;

  const T* panel(int64_t, int64_t column) const {
    return data + column / kStrip * kStrip * strip_depth + column % kStrip;
  }
  const char* panel_ahead(int64_t, int64_t, int64_t) const { return nullptr; }

  static int64_t elements(int64_t depth, int64_t columns) { return (columns + kStrip - 1) / kStrip * kStrip * depth; }
};

// A panel [depth, columns] in strips. It is read from front to back, too.
template <class T, class To>
void copy_strips(const T* from, int64_t depth, int64_t columns, int64_t strip_depth, To* to) {
  const int64_t whole = columns / kStrip * kStrip;
  for (int64_t k = 0; k < depth; ++k, from += columns) {
    To* out = to + k * kStrip;
    for (int64_t column = 0; column < whole; column += kStrip, out += kStrip * strip_depth) {
      simd::store(out, simd::load(from + column));
      simd::store(out + kLanes, simd::load(from + column + kLanes));
    }
    for (int64_t column = whole; column < columns; column += kLanes, out += kLanes)
      simd::store(out, simd::load_first(from + column, simd::lanes_left(column, columns)));
  }
}

}  // namespace attention
}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
