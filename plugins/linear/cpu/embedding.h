// One row of a weight as float32.
#pragma once

#include "tiles.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {

// 32 codes of the row at p, which starts the row's first quad in a block of a tile.
template <int bits>
void decode_codes(const uint8_t* p, int32_t* codes) {
  for (int i = 0; i < bits; ++i, p += kTile * 4) {
    for (int k = 0; k < 4; ++k) {
      if constexpr (bits == 8) {
        codes[4 * i + k] = p[k];
      } else {
        codes[8 * i + k] = p[k] & 15;
        codes[8 * i + 4 + k] = p[k] >> 4;
      }
    }
  }
}

inline float scale_at(const uint8_t* p, int64_t index, int scale_bytes) {
  // Vectors of kLanes numbers end inside the row's tile: rows are read from a multiple of kLanes.
  float lanes[kLanes];
  store(lanes, load_scales(p, index / kLanes * kLanes, scale_bytes));
  return lanes[index % kLanes];
}

inline void decode_row(const DenseWeight& weight, int64_t row, float* y) {
  const uint8_t* tile = weight.data + row / kTile * weight.stride();
  const int64_t lane = row % kTile;
  if (weight.type != kBFloat16Type) {
    const int bytes = weight.type == kFloat32Type ? 4 : 2;
    for (int64_t k = 0; k < weight.in_features; ++k) y[k] = scale_at(tile, k * kTile + lane, bytes);
    return;
  }
  for (int64_t k = 0; k < weight.in_features; ++k) {
    uint16_t half;
    __builtin_memcpy(&half, tile + 4 * (k / 2 * kTile + lane) + 2 * (k % 2), 2);
    const uint32_t bits = uint32_t(half) << 16;
    __builtin_memcpy(y + k, &bits, 4);
  }
}

inline void decode_row(const PackedWeight& weight, int64_t row, float* y) {
  const TileLayout layout(weight);
  const int64_t lane = row % kTile;
  const uint8_t* tile = weight.data + row / kTile * layout.stride;
  const uint8_t* codes = tile + lane * 4;
  int32_t block[kBlock];
  const int64_t span = weight.group < kBlock ? weight.group : kBlock;  // elements that surely share a scale
  for (int64_t k = 0; k < weight.in_features; k += span, y += span) {
    if (k % kBlock == 0) {
      weight.bits == 4 ? decode_codes<4>(codes, block) : decode_codes<8>(codes, block);
      codes += kTile * kBlock * weight.bits / 8;
      if (weight.zero == ZeroKind::float4)
        for (int32_t& code : block) code = kFloat4[code];
    }
    const int64_t index = k / weight.group * kTile + lane;
    const float scale = scale_at(tile + layout.scales, index, weight.scale_bytes);
    const bool has_offset = weight.zero == ZeroKind::offset;
    const float offset = has_offset ? scale_at(tile + layout.zeros, index, weight.scale_bytes) : 0.0f;
    int32_t zero = has_offset ? 0 : midpoint_of(weight.zero, weight.bits);
    if (weight.zero == ZeroKind::zero) zero = tile[layout.zeros + index];
    for (int i = 0; i < span; ++i) y[i] = float(block[k % kBlock + i] - zero) * scale + offset;
  }
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
