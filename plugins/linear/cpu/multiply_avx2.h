// A tile times a block of tokens on AVX2: all 16 rows in one pass, two vectors of them, so that memory is read from
// front to back and both vectors share a token's broadcasts. Included by tiles.h.
#pragma once

namespace slipstream {
namespace SLIPSTREAM_ISA {

// Weights are fetched this far ahead into the second-level cache, into the next tile if need be: without that, a short
// tile is over before the processor notices that it is read in order. One token fetches as fetch_ahead says.
constexpr int64_t kAhead = 12288;

// The compiler would add up in a tree, whose leaves it has no registers for.
SLIPSTREAM_INLINE __m256i in_order(__m256i sum) {
  asm("" : "+x"(sum));
  return sum;
}

// The nibbles of 32 bytes from bit `shift` on.
template <bool float4>
SLIPSTREAM_INLINE __m256i nibbles_at(const uint8_t* p, int shift) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i nibbles = _mm256_and_si256(shift == 0 ? bytes : _mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15));
  if constexpr (!float4) return nibbles;
  const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kFloat4));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), nibbles);
}

// Sums of each row's four bytes, times a factor.
SLIPSTREAM_INLINE Ints sum_bytes_of_rows(__m256i bytes, int8_t factor) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, _mm256_set1_epi8(factor)), _mm256_set1_epi16(1));
}

// Adds the products of a quad of 16 rows with those of each token, of which one lies kBlock after another.
template <int tokens>
SLIPSTREAM_INLINE void add_products(const __m256i (&quads)[2], const int8_t* x, __m256i (&products)[tokens][2]) {
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t) {
    int32_t four;
    __builtin_memcpy(&four, x + t * kBlock, 4);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h)
      products[t][h] = in_order(_mm256_add_epi16(products[t][h], _mm256_maddubs_epi16(quads[h], splat(four))));
  }
}

// Codes in lines `first` to `last` - 1 of a block, 64 bytes each, taken apart on the way as registers do not hold them:
// their products with each token, and their sums, of rows 0..7 and 8..15. Codes of 8 bits are multiplied as two nibbles,
// because products of whole bytes would saturate the 16-bit lanes of vpmaddubsw. Sixteen of a nibble, at most
// 16*15*128 = 30720, fit them, and so do eight of float4, whose codes reach 24, at most 8*24*128 = 24576: two lines.
template <int bits, bool float4, int tokens, int first, int last>
struct Products {
  static_assert(!float4 || last - first <= 2);
  Ints dots[tokens][2];
  Ints sums[2];

  SLIPSTREAM_INLINE Products(const uint8_t* p, const int8_t* x) {
    __m256i codes[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    __m256i products[tokens][2];
    for (auto& both : products) both[0] = both[1] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int i = first; i < last; ++i) {
      multiply(p + 64 * i, x + kStep * i, 0, codes, products);
      if constexpr (bits == 4) multiply(p + 64 * i, x + kStep * i + 4, 4, codes, products);
    }
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t)
      for (int h = 0; h < 2; ++h) {
        dots[t][h] = _mm256_madd_epi16(products[t][h], _mm256_set1_epi16(1));
        products[t][h] = _mm256_setzero_si256();
      }
    for (int h = 0; h < 2; ++h) sums[h] = sum_bytes_of_rows(codes[h], 1);
    if constexpr (bits == 8) {
      codes[0] = codes[1] = _mm256_setzero_si256();
#pragma GCC unroll 8
      for (int i = first; i < last; ++i) multiply(p + 64 * i, x + kStep * i, 4, codes, products);
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t)
        for (int h = 0; h < 2; ++h)
          dots[t][h] = _mm256_add_epi32(dots[t][h], _mm256_madd_epi16(products[t][h], _mm256_set1_epi16(16)));
      for (int h = 0; h < 2; ++h) sums[h] = _mm256_add_epi32(sums[h], sum_bytes_of_rows(codes[h], 16));
    }
  }

 private:
  static constexpr int kStep = 32 / bits;  // elements along K in a line

  // Sums of at most eight nibbles fit a byte.
  static SLIPSTREAM_INLINE void multiply(const uint8_t* p, const int8_t* x, int shift, __m256i (&codes)[2],
                                         __m256i (&products)[tokens][2]) {
    __m256i nibbles[2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      nibbles[h] = nibbles_at<float4>(p + 32 * h, shift);
      codes[h] = in_order(_mm256_add_epi8(codes[h], nibbles[h]));
    }
    add_products<tokens>(nibbles, x, products);
  }
};

// Scales, zero points and offsets of a vector of rows.
struct RowNumbers {
  Floats scale;
  Ints zero_point;
  Floats offset;

  // What a token's centre multiplies: the sum of the weights of `count` codes whose sum is given, without their offset.
  SLIPSTREAM_INLINE Floats weights(Ints sum, int count) const {
    return scale * to_floats(_mm256_sub_epi32(sum, _mm256_slli_epi32(zero_point, count == 32 ? 5 : 4)));
  }
};

template <int bits, ZeroKind zero>
SLIPSTREAM_INLINE RowNumbers row_numbers(const TileArgs& tile, int64_t index) {
  RowNumbers row{load_scales(tile.scales, index, tile.scale_bytes),
                 splat(zero == ZeroKind::offset ? 0 : midpoint_of(zero, bits)), splat(0.0f)};
  if constexpr (zero == ZeroKind::zero) row.zero_point = load_bytes(tile.zeros + index);
  if constexpr (zero == ZeroKind::offset) row.offset = load_scales(tile.zeros, index, tile.scale_bytes);
  return row;
}

// The numbers of a block of tokens, behind its codes.
template <int tokens>
struct TokenNumbers {
  const float* scales;
  const float* centres;
  const int32_t* terms;

  explicit TokenNumbers(const uint8_t* record)
      : scales(reinterpret_cast<const float*>(record + tokens * kBlock)),
        centres(scales + tokens),
        terms(reinterpret_cast<const int32_t*>(centres + tokens)) {}
};

// Adds what a block of rows 8h to 8h + 7 comes to. See kernel.cpp for the terms.
template <ZeroKind zero, int tokens>
SLIPSTREAM_INLINE void add_rows(int h, const RowNumbers& row, Floats weights, const Ints (&dots)[tokens][2],
                                const TokenNumbers<tokens>& token, Floats (&sum)[tokens][2]) {
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t) {
    Ints dot = dots[t][h];
    if constexpr (zero == ZeroKind::zero) {
      dot = _mm256_add_epi32(dot, multiply_small(row.zero_point, splat(token.terms[t])));
    } else if constexpr (zero != ZeroKind::offset) {
      dot = _mm256_add_epi32(dot, splat(token.terms[t]));
    }
    sum[t][h] = fma(to_floats(dot), row.scale * splat(token.scales[t]), sum[t][h]);
    sum[t][h] = fma(weights, splat(token.centres[t]), sum[t][h]);
    if constexpr (zero == ZeroKind::offset) {
      sum[t][h] = fma(row.offset, splat(reinterpret_cast<const float*>(token.terms)[t]), sum[t][h]);
    }
  }
}

// Adds a block's share to sums [tokens, 16].
template <int bits, ZeroKind zero, int tokens>
SLIPSTREAM_INLINE void add_block(const TileArgs& tile, int64_t group, const uint8_t* codes, const uint8_t* record,
                                 Floats (&sum)[tokens][2]) {
  constexpr bool float4 = zero == ZeroKind::float4;
  const int8_t* x = reinterpret_cast<const int8_t*>(record);
  Products<bits, float4, tokens, 0, float4 ? 2 : bits> block(codes, x);
  if constexpr (float4) {
    const Products<bits, float4, tokens, 2, 4> rest(codes, x);
    for (int h = 0; h < 2; ++h) {
      block.sums[h] = _mm256_add_epi32(block.sums[h], rest.sums[h]);
      for (int t = 0; t < tokens; ++t) block.dots[t][h] = _mm256_add_epi32(block.dots[t][h], rest.dots[t][h]);
    }
  }
  const TokenNumbers<tokens> token(record);
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const RowNumbers row = row_numbers<bits, zero>(tile, group * kTile + h * kLanes);
    add_rows<zero>(h, row, row.weights(block.sums[h], 32), block.dots, token, sum);
  }
}

// The same for groups of 16, of which a block holds two. Zeros are midpoints; a term holds two sums of codes.
template <int bits, int tokens>
SLIPSTREAM_INLINE void add_halves(const TileArgs& tile, int64_t group, const uint8_t* codes, const uint8_t* record,
                                  Floats (&sum)[tokens][2]) {
  const int8_t* x = reinterpret_cast<const int8_t*>(record);
  const Products<bits, false, tokens, 0, bits / 2> first(codes, x);
  const Products<bits, false, tokens, bits / 2, bits> second(codes, x);
  const TokenNumbers<tokens> token(record);
  for (int h = 0; h < 2; ++h) {
    const RowNumbers low = row_numbers<bits, ZeroKind::midpoint>(tile, group * kTile + h * kLanes);
    const RowNumbers high = row_numbers<bits, ZeroKind::midpoint>(tile, (group + 1) * kTile + h * kLanes);
    const Ints rest = _mm256_sub_epi32(second.sums[h], _mm256_slli_epi32(high.zero_point, 4));
    const Floats weights = fma(high.scale, to_floats(rest), low.weights(first.sums[h], 16));
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) {
      const Floats scale = splat(token.scales[t]);
      const int32_t term = token.terms[t];
      const Ints a = _mm256_sub_epi32(first.dots[t][h], splat(int32_t(int16_t(term)) * (1 << (bits - 1))));
      const Ints b = _mm256_sub_epi32(second.dots[t][h], splat((term >> 16) * (1 << (bits - 1))));
      sum[t][h] = fma(to_floats(a), low.scale * scale, sum[t][h]);
      sum[t][h] = fma(to_floats(b), high.scale * scale, sum[t][h]);
      sum[t][h] = fma(weights, splat(token.centres[t]), sum[t][h]);
    }
  }
}

// Fetches a block's worth of the next tiles, of each in turn, into the second-level cache: memory gives more in several
// places at once than in one. More than one token do not wait for it long enough to gain.
template <int bits>
SLIPSTREAM_INLINE void fetch_ahead(const TileArgs& tile, uint64_t turn) {
  const uint8_t* ahead = tile.next + turn % kAheadTiles * tile.stride + turn / kAheadTiles * tile.step;
  for (int i = 0; i <= bits; ++i) __builtin_prefetch(ahead + 64 * i, 0, 2);
}

// out is [tokens, 16].
template <int bits, ZeroKind zero, bool halves, int tokens>
void multiply_tile(const TileArgs& tile, const uint8_t* record, float* out) {
  Floats sum[tokens][2];
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t) sum[t][0] = sum[t][1] = splat(0.0f);
  const uint8_t *codes = tile.codes, *ahead = codes + kAhead;
  [[maybe_unused]] uint64_t turn = uint64_t(tile.before);
  const int blocks = halves ? 1 : tile.blocks;
  for (int64_t g = 0; g < tile.groups; g += halves ? 2 : 1) {
    for (int b = 0; b < blocks; ++b) {
      if constexpr (tokens == 1) {
        fetch_ahead<bits>(tile, turn++);
      } else {
        for (int i = 0; i <= bits; ++i) __builtin_prefetch(ahead + 64 * i, 0, 2);
        ahead += tile.step;
      }
      if constexpr (halves) {
        add_halves<bits>(tile, g, codes, record, sum);
      } else {
        add_block<bits, zero>(tile, g, codes, record, sum);
      }
      codes += kTile * kBlock * bits / 8;
      record += tokens * kRecordBytes;
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t) {
    store(out + t * kTile, sum[t][0]);
    store(out + t * kTile + kLanes, sum[t][1]);
  }
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
