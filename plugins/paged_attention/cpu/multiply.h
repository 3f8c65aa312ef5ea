// c = a * b or c += a * b for a few rows of a, with b in page-sized panels of any page type.
//
// Both products of attention have this form: scores = q * k, where a page holds k as [head_dim, page_size], and
// output = probabilities * v, where it holds v as [page_size, head_dim]. Lanes run along the columns of b, so one
// vector of b serves all rows; a is read by broadcasts. Every element is one chain of multiply-adds in the order of
// the depth, whatever the blocking, so a row's result does not depend on the rows beside it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace attention {

using simd::kLanes;
using simd::Floats;

// Rows of a that are multiplied together: with two vectors of columns, as many accumulators as registers allow.
constexpr int kRows = simd::kRegisters == 32 ? 12 : 6;

// Columns that are multiplied together.
constexpr int kStrip = 2 * kLanes;
// Whether copies of panels are in strips. Strips of AVX-512 are whole rows of a page of keys, or half of a head's values:
// not seen to gain.
constexpr bool kInStrips = simd::kRegisters == 16;

// The right-hand matrix: `depth` rows, `panel_depth` of them in each panel, `stride` elements apart.
template <class T>
struct Panels {
  using Element = T;
  static constexpr bool in_strips = false;
  const T* const* data;
  const T* const* ahead;  // panels to bring to the second-level cache meanwhile, a line for each line that is read
  int64_t panel_depth;
  int64_t depth;
  int64_t stride;
};

// The same, copied so that every strip of columns of a panel is read from front to back.
struct Strips {
  using Element = float;
  static constexpr bool in_strips = true;
  const float* const* data;
  int64_t panel_depth;
  int64_t depth;

  static int64_t elements(int64_t depth, int64_t columns) { return (columns + kStrip - 1) / kStrip * kStrip * depth; }
};

// A panel [depth, columns] in strips. It is read from front to back, too.
template <class T>
const float* copy_strips(const T* from, int64_t depth, int64_t columns, float* to) {
  const int64_t whole = columns / kStrip * kStrip;
  for (int64_t k = 0; k < depth; ++k, from += columns) {
    float* out = to + k * kStrip;
    for (int64_t column = 0; column < whole; column += kStrip, out += kStrip * depth) {
      simd::store(out, simd::load(from + column));
      simd::store(out + kLanes, simd::load(from + column + kLanes));
    }
    for (int64_t column = whole; column < columns; column += kLanes, out += kLanes)
      simd::store(out, simd::load_first(from + column, static_cast<int>(std::min<int64_t>(kLanes, columns - column))));
  }
  return to;
}

template <class B, int rows, int vectors, bool partial>
SLIPSTREAM_INLINE void multiply_block(const float* a, int64_t a_stride, const B& b, int64_t column, int count,
                                      float* c, int64_t c_stride, bool accumulate) {
  using T = typename B::Element;
  Floats sum[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
      sum[r][v] = accumulate ? simd::load(c + r * c_stride + column + v * kLanes) : simd::splat(0.0f);
  // One pointer for three rows: x86 addresses p, p + s and p + 2 s with the same two registers.
  const float* left[(rows + 2) / 3];
#pragma GCC unroll 4
  for (int r = 0; r < rows; r += 3) left[r / 3] = a + r * a_stride;
  for (int64_t done = 0, panel = 0; done < b.depth; done += b.panel_depth, ++panel) {
    const T* right;
    int64_t stride;
    [[maybe_unused]] int64_t ahead = 0;
    if constexpr (B::in_strips) {
      right = b.data[panel] + column / kStrip * kStrip * b.panel_depth + column % kStrip;
      stride = kStrip;
    } else {
      right = b.data[panel] + column;
      stride = b.stride;
      ahead = reinterpret_cast<const char*>(b.ahead[panel]) - reinterpret_cast<const char*>(b.data[panel]);
    }
    const int64_t depth = b.depth - done < b.panel_depth ? b.depth - done : b.panel_depth;
    for (int64_t k = 0; k < depth; ++k, right += stride) {
      if constexpr (!B::in_strips)
        for (int64_t i = 0; i < vectors * kLanes * static_cast<int64_t>(sizeof(T)); i += 64)
          __builtin_prefetch(reinterpret_cast<const char*>(right) + ahead + i, 0, 2);
      if constexpr (rows < vectors && simd::kRegisters == 16) {
        // One vector of columns at a time: accumulators, what rows broadcast and that vector are all that fits.
        Floats broadcast[rows];
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) broadcast[r] = simd::splat(left[r / 3][(r % 3) * a_stride]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          const Floats lanes = simd::load(right + v * kLanes);
#pragma GCC unroll 4
          for (int r = 0; r < rows; ++r) sum[r][v] = simd::fma(broadcast[r], lanes, sum[r][v]);
        }
      } else {
        Floats lanes[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v)
          lanes[v] = partial ? simd::load_first(right, count) : simd::load(right + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v)
            sum[r][v] = simd::fma_splat(left[r / 3] + (r % 3) * a_stride, lanes[v], sum[r][v]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < rows; r += 3) ++left[r / 3];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) simd::store(c + r * c_stride + column + v * kLanes, sum[r][v]);
}

template <class B, int rows>
__attribute__((noinline)) void multiply_rows(const float* a, int64_t a_stride, const B& b, int64_t columns, float* c,
                                             int64_t c_stride, bool accumulate) {
  int64_t column = 0;
  if constexpr (rows * 2 <= kRows && !B::in_strips)
    for (; column + 4 * kLanes <= columns; column += 4 * kLanes)
      multiply_block<B, rows, 4, false>(a, a_stride, b, column, kLanes, c, c_stride, accumulate);
  for (; column + 2 * kLanes <= columns; column += 2 * kLanes)
    multiply_block<B, rows, 2, false>(a, a_stride, b, column, kLanes, c, c_stride, accumulate);
  for (; column + kLanes <= columns; column += kLanes)
    multiply_block<B, rows, 1, false>(a, a_stride, b, column, kLanes, c, c_stride, accumulate);
  if constexpr (kLanes > 8)
    if (column < columns)
      multiply_block<B, rows, 1, true>(a, a_stride, b, column, static_cast<int>(columns - column), c, c_stride,
                                       accumulate);
}

template <int n>
struct Step {
  static constexpr int rows = n;
};

// Any number of rows. Rows of c must have room for `columns` rounded up to whole vectors.
template <class B>
void multiply(int64_t rows, const float* a, int64_t a_stride, const B& b, int64_t columns, float* c, int64_t c_stride,
              bool accumulate) {
  const auto take = [&](auto step) {
    for (; rows >= step.rows; rows -= step.rows) {
      multiply_rows<B, step.rows>(a, a_stride, b, columns, c, c_stride, accumulate);
      a += step.rows * a_stride;
      c += step.rows * c_stride;
    }
  };
  if constexpr (kRows == 12) {
    take(Step<12>{});
    take(Step<8>{});
  }
  take(Step<6>{});
  take(Step<4>{});
  take(Step<3>{});
  take(Step<2>{});
  take(Step<1>{});
}

}  // namespace attention
}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
