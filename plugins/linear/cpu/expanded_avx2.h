// Tiles of 4-bit codes taken apart once for many blocks of tokens, on AVX2. What a block of tokens would otherwise do
// again for every tile, masks, sums of codes and conversions of scales, is a fifth of its instructions. Included by
// tiles.h.
#pragma once

namespace slipstream {
namespace SLIPSTREAM_ISA {

// A block of 32 codes of 16 rows: a byte each, [quad 8, row 16, 4], then [row 16] scales, weights (what a token's centre
// multiplies) and, where there are any, zero points (int32) or offsets.
constexpr int64_t kExpandedBytes = kTile * (kBlock + 3 * 4);

template <ZeroKind zero>
void expand_tile(const TileArgs& tile, uint8_t* out) {
  constexpr bool float4 = zero == ZeroKind::float4;
  const uint8_t *codes = tile.codes, *ahead = codes + kAhead;
  const auto put = [](uint8_t* to, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v); };
  for (int64_t g = 0; g < tile.groups; ++g) {
    for (int b = 0; b < tile.blocks; ++b, codes += kTile * kBlock / 2, ahead += tile.step, out += kExpandedBytes) {
      for (int i = 0; i <= 4; ++i) __builtin_prefetch(ahead + 64 * i, 0, 2);
      for (int h = 0; h < 2; ++h) {
        __m256i sum = _mm256_setzero_si256();  // of bytes: eight codes of at most 24 fit
        for (int q = 0; q < 8; ++q) {
          const __m256i quad = nibbles_at<float4>(codes + 64 * (q / 2) + 32 * h, q % 2 * 4);
          put(out + 64 * q + 32 * h, quad);
          sum = _mm256_add_epi8(sum, quad);
        }
        const RowNumbers row = row_numbers<4, zero>(tile, g * kTile + h * kLanes);
        float* numbers = reinterpret_cast<float*>(out + kTile * kBlock) + h * kLanes;
        store(numbers, row.scale);
        store(numbers + kTile, row.weights(sum_bytes_of_rows(sum, 1), 32));
        if constexpr (zero == ZeroKind::zero) put(reinterpret_cast<uint8_t*>(numbers + 2 * kTile), row.zero_point);
        if constexpr (zero == ZeroKind::offset) store(numbers + 2 * kTile, row.offset);
      }
    }
  }
}

// A tile of `blocks` blocks times a block of tokens; out is [tokens, 16].
template <ZeroKind zero, int tokens>
void multiply_expanded(const uint8_t* tile, int64_t blocks, const uint8_t* record, float* out) {
  constexpr int part = zero == ZeroKind::float4 ? 4 : 8;  // quads whose products fit 16 bits: see Products
  Floats sum[tokens][2];
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t) sum[t][0] = sum[t][1] = splat(0.0f);
  for (int64_t b = 0; b < blocks; ++b, tile += kExpandedBytes, record += tokens * kRecordBytes) {
    Ints dots[tokens][2];
#pragma GCC unroll 2
    for (int first = 0; first < 8; first += part) {
      __m256i products[tokens][2];
      for (auto& both : products) both[0] = both[1] = _mm256_setzero_si256();
#pragma GCC unroll 8
      for (int q = first; q < first + part; ++q) {
        const __m256i* quads = reinterpret_cast<const __m256i*>(tile + 64 * q);
        const __m256i pair[2] = {_mm256_loadu_si256(quads), _mm256_loadu_si256(quads + 1)};
        add_products<tokens>(pair, reinterpret_cast<const int8_t*>(record) + 4 * q, products);
      }
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t)
        for (int h = 0; h < 2; ++h) {
          const __m256i dot = _mm256_madd_epi16(products[t][h], _mm256_set1_epi16(1));
          dots[t][h] = first == 0 ? dot : _mm256_add_epi32(dots[t][h], dot);
        }
    }
    const TokenNumbers<tokens> token(record);
    const float* numbers = reinterpret_cast<const float*>(tile + kTile * kBlock);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h, numbers += kLanes) {
      RowNumbers row{load(numbers), splat(0), splat(0.0f)};
      if constexpr (zero == ZeroKind::zero)
        row.zero_point = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers + 2 * kTile));
      if constexpr (zero == ZeroKind::offset) row.offset = load(numbers + 2 * kTile);
      add_rows<zero>(h, row, load(numbers + kTile), dots, token, sum);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t) {
    store(out + t * kTile, sum[t][0]);
    store(out + t * kTile + kLanes, sum[t][1]);
  }
}

// How tiles of a weight are expanded and multiplied with kMaxTokens tokens.
struct Expansion {
  static constexpr bool any = true;
  static constexpr int64_t block_bytes = kExpandedBytes;

  struct Kernels {
    void (*expand)(const TileArgs& tile, uint8_t* out);
    void (*multiply)(const uint8_t* tile, int64_t blocks, const uint8_t* record, float* out);
  };

  static Kernels kernels(ZeroKind zero) {
    switch (zero) {
      case ZeroKind::midpoint: return of<ZeroKind::midpoint>();
      case ZeroKind::zero: return of<ZeroKind::zero>();
      case ZeroKind::offset: return of<ZeroKind::offset>();
      default: return of<ZeroKind::float4>();
    }
  }

 private:
  template <ZeroKind zero>
  static Kernels of() {
    return {expand_tile<zero>, multiply_expanded<zero, kMaxTokens>};
  }
};

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
