// The activations of a Linear, quantized to int8 once a call and laid out as the kernels read them.
//
// Every 32 elements of a token along K become codes -128..127 of the range between their minimum and maximum:
// x = code * scale + centre. That range is often far from symmetric about zero, so the centre gains most of a bit.
//
// Tokens are cut into blocks of at most kMaxTokens. A block of n tokens stores, for every 32 elements along K, a
// record of n * 44 bytes: codes int8 [n, 32], scales float32 [n], centres float32 [n], terms [n]. So a kernel reads
// one sequential stream, whatever K is. A term is what the zero of the weight multiplies: see term_of.
#pragma once

#include <cmath>
#include <limits>

#include "codes.h"
#include "cpu/scratch.h"
#include "operators.h"
#include "weight.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {

constexpr int64_t kBlock = 32;
constexpr int64_t kRecordBytes = 44;  // of one token and one block
// Blocks of a narrower range are taken as their minimum everywhere: 255 / range would overflow.
constexpr float kNarrowest = 0x1p-100f;

// Tokens in the next block when `left` remain. Never a matter of results: a token's arithmetic is the same in any block.
inline int block_tokens(int64_t left) {
  if (left >= kMaxTokens) return kMaxTokens;
  return left > 8 ? 8 : int(left);
}

// midpoint and float4: the zero point times the sum of the codes, ready to be the start of the dot product. zero: the sum, to be
// multiplied by a row's zero point. offset: the sum of the quantized values, a float, to be multiplied by the offset.
// Groups of 16: the sums of the first 16 codes and of the others, as two int16 (at most 16 * 128).
inline uint32_t term_of(const PackedWeight& weight, const int8_t* codes, int32_t sum, float scale, float centre) {
  if (weight.group < int(kBlock)) {
    int32_t first = 0;
    for (int i = 0; i < kBlock / 2; ++i) first += codes[i];
    return (uint32_t(first) & 0xffff) | uint32_t(sum - first) << 16;
  }
  if (weight.zero == ZeroKind::zero) return uint32_t(-sum);
  if (weight.zero != ZeroKind::offset) return uint32_t(-sum * midpoint_of(weight.zero, weight.bits));
  const float value = scale * float(sum) + kBlock * centre;
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

inline void normalise(const float* x, const float* weight, float eps, int64_t n, float* out) {
  const int64_t whole = n / kBlock * kBlock;
  double sum = sum_of_squares(x, whole);
  for (int64_t i = whole; i < n; ++i) sum += double(x[i]) * double(x[i]);
  const float inverse = float(1.0 / std::sqrt(sum / double(n) + double(eps)));
  for (int64_t i = 0; i < whole; i += kLanes) store(out + i, load(x + i) * splat(inverse) * load(weight + i));
  for (int64_t i = whole; i < n; ++i) out[i] = x[i] * inverse * weight[i];
}

// Quantizes token `index` of a block of `count` tokens.
inline void quantize_token(const PackedWeight& weight, const float* x, int count, int index, uint8_t* block) {
  for (int64_t k = 0; k < weight.in_features; k += kBlock, block += count * kRecordBytes) {
    const Range range = range_of(x + k);
    const float width = range.high - range.low;
    int8_t* codes = reinterpret_cast<int8_t*>(block) + index * kBlock;
    float scale = 0.0f, centre = range.low;
    int32_t sum = 0;
    if (width >= kNarrowest && width <= std::numeric_limits<float>::max()) {
      scale = width / 255.0f;
      centre = range.low + 128.0f * scale;
      sum = quantize_block(x + k, range.low, 255.0f / width, codes);
    } else {
      __builtin_memset(codes, 0, kBlock);
      // An infinity, a NaN or a range beyond float32 shows in every output of this token.
      if (!(width < kNarrowest)) centre = std::numeric_limits<float>::quiet_NaN();
    }
    const uint32_t term = term_of(weight, codes, sum, scale, centre);
    uint8_t* numbers = block + count * kBlock + index * 4;
    __builtin_memcpy(numbers, &scale, 4);
    __builtin_memcpy(numbers + count * 4, &centre, 4);
    __builtin_memcpy(numbers + count * 8, &term, 4);
  }
}

inline void quantize_tokens(const LinearArgs& args, const PackedWeight& weight, int64_t first, int count,
                            uint8_t* block) {
  static thread_local Scratch scratch;
  const int64_t columns = weight.in_features;
  float* normal = args.norm_weight ? scratch.reserve<float>(columns) : nullptr;
  for (int i = 0; i < count; ++i) {
    const float* x = args.x + (first + i) * columns;
    if (normal) normalise(x, args.norm_weight, args.norm_eps, columns, normal);
    quantize_token(weight, normal ? normal : x, count, i, block);
  }
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
