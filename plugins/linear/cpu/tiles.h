// The blob's tiles of 16 weight rows, and their products with blocks of tokens.
#pragma once

#include "activations.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {

inline Floats load_scales(const uint8_t* p, int64_t index, int scale_bytes) {
  if (scale_bytes == 2) return load_halves(p + 2 * index);
  Floats out;
  __builtin_memcpy(&out, p + 4 * index, sizeof out);
  return out;
}

struct TileArgs {
  const uint8_t* codes;
  const uint8_t* scales;
  const uint8_t* zeros;
  int64_t groups;
  int64_t step;  // bytes of weight a block, for fetching ahead
  int blocks;  // of 32 elements in a group
  int scale_bytes;
  // Tiles are counted in groups of kAheadTiles. While one of them is read, the next is fetched.
  const uint8_t* next;  // the group behind this tile's
  int64_t stride;       // bytes from tile to tile
  int64_t before;       // blocks of this tile's group before it
};

constexpr int64_t kAheadTiles = 4;

// A tile of a blob in the format of `weight`, by its number.
inline TileArgs tile_at(const PackedWeight& weight, const TileLayout& layout, const uint8_t* blob, int64_t number) {
  const uint8_t* base = blob + number * layout.stride;
  const int64_t place = number % kAheadTiles, blocks = weight.in_features / kBlock;
  return {base,
          base + layout.scales,
          base + layout.zeros,
          layout.groups,
          layout.stride / blocks,
          weight.group / int(kBlock),
          weight.scale_bytes,
          base + (kAheadTiles - place) * layout.stride,
          layout.stride,
          place * blocks};
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream

#if defined(__AVX2__) && !defined(__AVX512VNNI__)
#include "multiply_avx2.h"
#include "expanded_avx2.h"
#else
#include "multiply_lanes.h"
#endif

namespace slipstream {
namespace SLIPSTREAM_ISA {

using TileKernel = void (*)(const TileArgs&, const uint8_t* block, float* out);

template <int bits, ZeroKind zero, bool halves = false>
TileKernel kernel_for(int tokens) {
  switch (tokens) {
    case 1: return multiply_tile<bits, zero, halves, 1>;
    case 2: return multiply_tile<bits, zero, halves, 2>;
    case 3: return multiply_tile<bits, zero, halves, 3>;
    case 4: return multiply_tile<bits, zero, halves, 4>;
  }
  if constexpr (kMaxTokens > 4) {
    switch (tokens) {
      case 5: return multiply_tile<bits, zero, halves, 5>;
      case 6: return multiply_tile<bits, zero, halves, 6>;
    }
  }
  if constexpr (kMaxTokens > 6) {
    switch (tokens) {
      case 7: return multiply_tile<bits, zero, halves, 7>;
      case 8: return multiply_tile<bits, zero, halves, 8>;
    }
  }
  return multiply_tile<bits, zero, halves, kMaxTokens>;
}

template <int bits>
TileKernel kernel_for(ZeroKind zero, int tokens) {
  switch (zero) {
    case ZeroKind::midpoint: return kernel_for<bits, ZeroKind::midpoint>(tokens);
    case ZeroKind::zero: return kernel_for<bits, ZeroKind::zero>(tokens);
    default: return kernel_for<bits, ZeroKind::offset>(tokens);
  }
}

inline TileKernel kernel_for(const PackedWeight& weight, int tokens) {
  if (weight.group < int(kBlock)) return kernel_for<8, ZeroKind::midpoint, true>(tokens);
  if (weight.zero == ZeroKind::float4) return kernel_for<4, ZeroKind::float4>(tokens);
  return weight.bits == 4 ? kernel_for<4>(weight.zero, tokens) : kernel_for<8>(weight.zero, tokens);
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
