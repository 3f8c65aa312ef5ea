// c = a * b or c += a * b for a few rows of a, with b in panels of any page type.
//
// Both products of attention have this form: scores = q * k, where a page holds k as [head_dim, page_size], and
// output = probabilities * v, where it holds v as [page_size, head_dim]. Lanes run along the columns of b, so one
// vector of b serves all rows; a is read by broadcasts. Every element is one chain of multiply-adds in the order of
// the depth, whatever the blocking, so a row's result does not depend on the rows beside it.
#pragma once

#include <cstdint>

#include "cpu/simd.h"
#include "panels.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace attention {

// Rows of a that are multiplied together: with two vectors of columns, as many accumulators as registers allow.
constexpr int kRows = simd::kRegisters == 32 ? 12 : 6;

template <class B, int rows, int vectors, bool partial>
SLIPSTREAM_INLINE void multiply_block(const Left<typename B::Element>* a, int64_t a_stride, const B& b, int64_t column,
                                      int count, float* c, int64_t c_stride, const float* units, bool accumulate) {
  using T = typename B::Element;
  using Sums = typename Product<T>::Sums;
  constexpr bool integers = kPack<T> == 2;
  Sums sum[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
      if constexpr (integers) {
        sum[r][v] = simd::splat(int32_t{0});
      } else {
        sum[r][v] = accumulate ? simd::load(c + r * c_stride + column + v * kLanes) : simd::splat(0.0f);
      }
  // One pointer for three rows: x86 addresses p, p + s and p + 2 s with the same two registers.
  const Left<T>* left[(rows + 2) / 3];
#pragma GCC unroll 4
  for (int r = 0; r < rows; r += 3) left[r / 3] = a + r * a_stride;
  for (int64_t done = 0, panel = 0; done < b.depth; done += b.panel_depth, ++panel) {
    const T* right = b.panel(panel, column);
    [[maybe_unused]] const char* ahead = b.panel_ahead(panel, column, partial ? count : vectors * kLanes);
    const int64_t depth = b.depth - done < b.panel_depth ? b.depth - done : b.panel_depth;
    for (int64_t k = 0; k < depth; ++k, right += b.stride) {
      if constexpr (!B::in_strips) {
        constexpr int64_t bytes = vectors * kLanes * sizeof(typename B::Ahead);
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(ahead + i, 0, 2);
        ahead += bytes;
        if constexpr (sizeof(typename B::Ahead) < sizeof(T))
          if (k % 2 == 1) __builtin_prefetch(reinterpret_cast<const char*>(b.after[panel]) + k * 64, 0, 2);
      }
      if constexpr (rows < vectors && simd::kRegisters == 16) {
        // One vector of columns at a time: accumulators, what rows broadcast and that vector are all that fits.
        Sums broadcast[rows];
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) broadcast[r] = simd::splat(left[r / 3][(r % 3) * a_stride]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          const Sums lanes = simd::load(right + v * kLanes);
#pragma GCC unroll 4
          for (int r = 0; r < rows; ++r) sum[r][v] = simd::fma(broadcast[r], lanes, sum[r][v]);
        }
      } else {
        Sums lanes[vectors];
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
    for (int v = 0; v < vectors; ++v) {
      float* out = c + r * c_stride + column + v * kLanes;
      if constexpr (integers) {
        const Floats unit = simd::splat(units[r]), sums = simd::to_floats(sum[r][v]);
        simd::store(out, accumulate ? simd::fma(sums, unit, simd::load(out)) : sums * unit);
      } else {
        simd::store(out, sum[r][v]);
      }
    }
}

template <class B, int rows>
__attribute__((noinline)) void multiply_rows(const Left<typename B::Element>* a, int64_t a_stride, const B& b,
                                             int64_t columns, float* c, int64_t c_stride, const float* units,
                                             bool accumulate) {
  int64_t column = 0;
  if constexpr (rows * 2 <= kRows && !B::in_strips)
    for (; column + 4 * kLanes <= columns; column += 4 * kLanes)
      multiply_block<B, rows, 4, false>(a, a_stride, b, column, kLanes, c, c_stride, units, accumulate);
  for (; column + 2 * kLanes <= columns; column += 2 * kLanes)
    multiply_block<B, rows, 2, false>(a, a_stride, b, column, kLanes, c, c_stride, units, accumulate);
  for (; column + kLanes <= columns; column += kLanes)
    multiply_block<B, rows, 1, false>(a, a_stride, b, column, kLanes, c, c_stride, units, accumulate);
  if constexpr (kLanes > 8)
    if (column < columns)
      multiply_block<B, rows, 1, true>(a, a_stride, b, column, static_cast<int>(columns - column), c, c_stride,
                                       units, accumulate);
}

template <int n>
struct Step {
  static constexpr int rows = n;
};

// Any number of rows. Rows of c must have room for `columns` rounded up to whole vectors. Products of integers are in
// the unit of their row.
template <class B>
void multiply(int64_t rows, const Left<typename B::Element>* a, int64_t a_stride, const B& b, int64_t columns, float* c,
              int64_t c_stride, const float* units, bool accumulate) {
  const auto take = [&](auto step) {
    for (; rows >= step.rows; rows -= step.rows) {
      multiply_rows<B, step.rows>(a, a_stride, b, columns, c, c_stride, units, accumulate);
      a += step.rows * a_stride;
      c += step.rows * c_stride;
      if (units != nullptr) units += step.rows;
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
