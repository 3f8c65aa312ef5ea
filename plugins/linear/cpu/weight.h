// The weight of Linear and Embedding, which their attributes describe. packing.py documents and writes the blob.
#pragma once

#include <cstdint>


namespace slipstream {

// How a code q becomes a weight: (q - 2^(bits-1)) s, (q - zero) s, q s + offset, or (kFloat4[q] - 12) s.
enum class ZeroKind : int32_t { midpoint = 0, zero = 1, offset = 2, float4 = 3 };

// Of weight_type.
constexpr int64_t kBFloat16Type = 2, kFloat16Type = 3, kFloat32Type = 4, kFloat4Type = 5;
// Twice the numbers of float4_e2m1, which are whole, plus 12; scales are stored halved.
constexpr uint8_t kFloat4[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

struct PackedWeight {
  const uint8_t* data;   // 64-byte alignment is faster, not required
  int64_t in_features;   // K, a multiple of group and of 32
  int64_t out_features;  // N; gate and up together when gated
  int32_t bits;          // 4 or 8
  int32_t group;         // elements along K that share a scale: a multiple of 32, or 16 with 8 bits and midpoints
  ZeroKind zero;
  int32_t scale_bytes;   // 2: scales and offsets are float16; 4: float32
  int32_t gated;         // 1: tiles alternate between gate rows (the first N/2) and up rows (the rest)
};

constexpr int kTile = 16;  // weight rows

static constexpr bool is_dense(int64_t weight_type) {
  return weight_type == kBFloat16Type || weight_type == kFloat16Type || weight_type == kFloat32Type;
}

// Numbers in tiles of 16 rows.
struct DenseWeight {
  const uint8_t* data;
  int64_t in_features;   // K
  int64_t out_features;  // N; gate and up together when gated
  int64_t type;          // of weight_type
  int32_t gated;         // as in PackedWeight

  int64_t parts() const { return gated ? 2 : 1; }
  int64_t depth() const { return (in_features + 1) / 2 * 2; }  // of a tile, whose elements come in pairs along K
  int64_t stride() const { return depth() * kTile * (type == kFloat32Type ? 4 : 2); }
  int64_t tiles() const { return parts() * ((out_features / parts() + kTile - 1) / kTile); }
};

template <class Args>
DenseWeight dense_weight(const Args& args, bool gated) {
  return {args.weight, args.in_features, args.out_features, args.weight_type, gated};
}

// What every code is less, where that is the same for all of them.
static constexpr int midpoint_of(ZeroKind zero, int bits) { return zero == ZeroKind::float4 ? 12 : 1 << (bits - 1); }

// Of a Linear or an Embedding, whose attributes have the same names.
template <class Args>
PackedWeight packed_weight(const Args& args, bool gated) {
  return {args.weight,
          args.in_features,
          args.out_features,
          static_cast<int32_t>(args.bits),
          static_cast<int32_t>(args.group_size),
          args.weight_type == kFloat4Type ? ZeroKind::float4 : static_cast<ZeroKind>(args.zero_kind),
          static_cast<int32_t>(args.scale_bytes),
          gated};
}

// Each translation unit has its own: the linker must not pick one that another instruction set compiled.
namespace {

// Where the parts of a tile lie in the blob: codes, then scales, then zero points or offsets.
struct TileLayout {
  int64_t groups, scales, zeros, stride;

  TileLayout() : groups(0), scales(0), zeros(0), stride(0) {}
  explicit TileLayout(const PackedWeight& w) {
    groups = w.in_features / w.group;
    scales = w.in_features * kTile * w.bits / 8;
    zeros = scales + groups * kTile * w.scale_bytes;
    const int64_t zero_bytes = w.zero == ZeroKind::zero ? 1 : w.zero == ZeroKind::offset ? w.scale_bytes : 0;
    stride = (zeros + groups * kTile * zero_bytes + 63) / 64 * 64;
  }
};

[[maybe_unused]] int64_t packed_bytes(const PackedWeight& w) {
  const int64_t parts = w.gated ? 2 : 1;
  return TileLayout(w).stride * parts * ((w.out_features / parts + kTile - 1) / kTile);
}

// Bytes of the blob that a node's attributes describe.
template <class Args>
int64_t blob_bytes(const Args& args, bool gated) {
  if (!is_dense(args.weight_type)) return packed_bytes(packed_weight(args, gated));
  const DenseWeight weight = dense_weight(args, gated);
  return weight.stride() * weight.tiles();
}

}  // namespace

}  // namespace slipstream
