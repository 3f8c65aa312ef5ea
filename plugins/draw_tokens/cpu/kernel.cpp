// One token of each row of logits. A row is read for the largest logit of every 64, and again for the weights of all
// tokens where top-p or nothing at all bounds the choice, of which only sums and maxima are kept. Whatever else looks for
// large values then skips the blocks that have none. Where top-p keeps few tokens their small weights need not be known:
// bounds of their sum, which cost a third of it, mostly tell where the nucleus ends.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/parallel.h"
#include "cpu/peak.h"
#include "cpu/scratch.h"
#include "operators.h"

namespace slipstream {
namespace SLIPSTREAM_ISA {
namespace {

using namespace simd;

// A larger nucleus is not sorted.
constexpr int64_t kMostSorted = 2048;
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr double kBelowOne = 1.0 - 0x1p-53;

// A value and its id in one number: the larger the value, and of equal ones the smaller the id, the smaller the key.
using Key = uint64_t;
// The type of the comparison keeps the standard library's templates apart, one an instruction set.
struct Before {
  bool operator()(Key a, Key b) const { return a < b; }
};

inline Key key_of(float value, int64_t id) {
  value += 0.0f;  // -0 is 0
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits ^= bits >> 31 ? 0 : 0x7fffffff;
  return Key(bits) << 32 | Key(id);
}
inline int64_t id_of(Key key) { return int64_t(key & 0xffffffff); }
// Of a value that is not negative.
inline float value_of(Key key) {
  const uint32_t bits = uint32_t(key >> 32) ^ 0x7fffffff;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline double sum_of(const Key* keys, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += value_of(keys[i]);
  return sum;
}

// What is made of a row on the way.
struct Work {
  float* maxima;  // of each block: the largest logit, then no less than the largest weight
  float* sums;    // of each block's weights
  Key* keys;      // of tokens that may be drawn
  float* weights;
};

Work reserve(int64_t vocab) {
  static thread_local Scratch floats, keys;
  const int64_t blocks = (vocab + kBlock - 1) / kBlock;
  float* maxima = floats.reserve<float>(blocks * (kBlock + 2));
  return {maxima, maxima + blocks, keys.reserve<Key>(vocab), maxima + 2 * blocks};
}

struct Draw {
  const float* logits;
  int64_t vocab;
  float peak;
  float scale;  // of a difference of logits to one of binary logarithms
  int64_t top_k;
  double top_p;
  float min_p;
  double uniform;
  Work work;

  int64_t blocks() const { return (vocab + kBlock - 1) / kBlock; }
  const float* block(int64_t index, float* padded) const { return block_of(logits, vocab, index, padded); }
};

int64_t first_of(const Draw& draw, float value) {
  int64_t b = 0;
  while (draw.work.maxima[b] != value) ++b;
  int64_t i = b * kBlock;
  while (draw.logits[i] != value) ++i;
  return i;
}

// Probabilities up to a common factor; the likeliest gets 1.
SLIPSTREAM_INLINE Floats weigh(Floats logits, Floats peak, Floats scale) { return exp2((logits - peak) * scale); }

// Puts what none of a block's weights exceeds in place of its largest logit.
void weigh_maxima(const Draw& draw) {
  const Floats peak = splat(draw.peak), scale = splat(draw.scale);
  // The largest logit's weight may be rounded to less than its neighbour's. Beyond the last there is room, of sums.
  for (int64_t b = 0; b < draw.blocks(); b += kLanes)
    store(draw.work.maxima + b, weigh(load(draw.work.maxima + b), peak, scale) * splat(1.0f + 0x1p-20f));
}

float weight_of_block(const Draw& draw, int64_t b) {
  const Floats peak = splat(draw.peak), scale = splat(draw.scale);
  float padded[kBlock];
  const float* x = draw.block(b, padded);
  Floats sum = splat(0.0f);
  for (int64_t i = 0; i < kBlock; i += kLanes) sum = sum + weigh(load(x + i), peak, scale);
  return reduce_add(sum);
}

// The sum of every block's weights, and of all.
double weigh_all(const Draw& draw) {
  double total = 0.0;
  for (int64_t b = 0; b < draw.blocks(); ++b) total += draw.work.sums[b] = weight_of_block(draw, b);
  return total;
}

struct Bounds {
  double least, most;
};

// Between what the sum of all weights is. Of blocks without large ones they are taken from the straight lines between
// powers of two, which are above 2^x, and nowhere by more than 6.15%: their sum's bounds are that far apart.
Bounds bounds_of_all(const Draw& draw) {
  constexpr float kLarge = 0x1p-6f;
  // Both exponents, of up to 127, are rounded in their last place.
  constexpr double kLine = 1.0 / 1.0616, kRounding = 4e-5;
  const Floats peak = splat(draw.peak), scale = splat(draw.scale), one = splat(127.0f);
  double known = 0.0, lines = 0.0;
  for (int64_t b = 0; b < draw.blocks(); ++b) {
    if (draw.work.maxima[b] >= kLarge) {
      known += weight_of_block(draw, b);
      continue;
    }
    float padded[kBlock];
    const float* x = draw.block(b, padded);
    Floats sum[2] = {splat(0.0f), splat(0.0f)};
    for (int64_t i = 0; i < kBlock; i += 2 * kLanes)
      for (int64_t s = 0; s < 2; ++s) sum[s] = sum[s] + exp2_line(fma(load(x + i + s * kLanes) - peak, scale, one));
    lines += reduce_add(sum[0] + sum[1]);
  }
  return {(known + lines * kLine) * (1.0 - kRounding), (known + lines) * (1.0 + kRounding)};
}

void weigh_some(const Draw& draw, const float* logits, int64_t count, float* weights) {
  const Floats peak = splat(draw.peak), scale = splat(draw.scale);
  for (int64_t i = 0; i < count; i += kLanes) store(weights + i, weigh(load(logits + i), peak, scale));
}

// The weights of keys' tokens in their order.
void weigh_keys(const Draw& draw, int64_t count) {
  float* weights = draw.work.weights;
  for (int64_t i = 0; i < count; ++i) weights[i] = draw.logits[id_of(draw.work.keys[i])];
  for (int64_t i = count; i % kLanes != 0; ++i) weights[i] = draw.peak;
  weigh_some(draw, weights, count, weights);
}

// How to come by the values of a block: 64 of them, of which those beyond the vocabulary are to be left.
struct Logits {
  const float* operator()(const Draw& draw, int64_t b, float* buffer) const { return draw.block(b, buffer); }
};
struct Weights {
  const float* operator()(const Draw& draw, int64_t b, float* buffer) const {
    weigh_some(draw, draw.block(b, buffer), kBlock, buffer);
    return buffer;
  }
};

// A lower bound of the k-th largest logit: what at least k of the blocks' maxima reach, and not many more. Found by
// halves, since to count all maxima takes a hundredth of the time to sort them.
float bound_of_largest(const Draw& draw, int64_t k) {
  float least = kLowest, most = draw.peak;  // fewer than k reach the latter, or it is the bound
  const int64_t enough = k + k / 8;
  auto count = [&](float bound) {
    int32_t found = 0;
    for (int64_t b = 0; b < draw.blocks(); ++b) found += draw.work.maxima[b] >= bound;
    return int64_t(found);
  };
  // Steps that grow from the peak on find the scale of what is to be halved.
  for (float step = 1.0f; least == kLowest; step *= 2.0f) {
    const float bound = draw.peak - step;
    if (!(bound > kLowest)) return kLowest;
    (count(bound) >= k ? least : most) = bound;
  }
  for (int turn = 0; turn < 20; ++turn) {
    const float middle = least + 0.5f * (most - least);
    const int64_t found = count(middle);
    (found >= k ? least : most) = middle;
    if (found >= k && found <= enough) break;
  }
  return least;
}

// Keys of the values from `least` on and below `end`, by id.
template <class Values>
int64_t gather(const Draw& draw, Values values, float least, float end, Key* keys) {
  int64_t count = 0;
  for (int64_t b = 0; b < draw.blocks(); ++b) {
    if (!(draw.work.maxima[b] >= least)) continue;
    float buffer[kBlock];
    const float* block = values(draw, b, buffer);
    const int64_t first = b * kBlock, size = std::min(kBlock, draw.vocab - first);
    for (int64_t i = 0; i < size; i += kLanes)
      for (uint32_t lanes = lanes_from(load(block + i), least); lanes != 0; lanes &= lanes - 1) {
        const int64_t at = i + __builtin_ctz(lanes);
        if (block[at] < end && at < size) keys[count++] = key_of(block[at], first + at);
      }
  }
  return count;
}

// The keys of the k largest logits and of ties with the last, in order.
int64_t largest(const Draw& draw, int64_t k) {
  Key* keys = draw.work.keys;
  float least = bound_of_largest(draw, std::min(k, (draw.blocks() + 1) / 2));
  int64_t count = gather(draw, Logits(), least, INFINITY, keys);
  while (count < k && least > kLowest) {
    // The last term makes a step of numbers so large that a quarter is nothing to them.
    const float step = std::max({0.25f * (draw.peak - least), 0.25f, 0x1p-20f * std::fabs(least)});
    least = std::max(kLowest, least - step);
    count = gather(draw, Logits(), least, INFINITY, keys);
  }
  Key* end = keys + count;
  if (count > k) {
    std::nth_element(keys, keys + k - 1, end, Before());
    const Key last = keys[k - 1] >> 32;
    end = std::partition(keys + k, end, [last](Key key) { return key >> 32 == last; });
  }
  std::sort(keys, end, Before());
  return end - keys;
}

// How many of the weights from the first on have a share of their sum.
int64_t nucleus_size(const float* weights, int64_t count, double share) {
  double total = 0.0, sum = 0.0;
  for (int64_t i = 0; i < count; ++i) total += weights[i];
  for (int64_t i = 0; i < count; ++i)
    if ((sum += weights[i]) >= share * total) return i + 1;
  return count;
}

// The place at which the running sum of weights exceeds its share of their sum.
int64_t pick(const float* weights, int64_t count, double uniform) {
  double total = 0.0, sum = 0.0;
  for (int64_t i = 0; i < count; ++i) total += weights[i];
  const double target = uniform * total;  // below the total
  for (int64_t i = 0; i < count; ++i)
    if ((sum += weights[i]) > target) return i;
  return count - 1;
}

// The choice among the weights in the order of their keys.
int64_t pick_key(const Draw& draw, int64_t count) {
  float* weights = draw.work.weights;
  for (int64_t i = 0; i < count; ++i) weights[i] = weights[i] >= draw.min_p ? weights[i] : 0.0f;
  return id_of(draw.work.keys[pick(weights, count, draw.uniform)]);
}

int64_t draw_of_all(const Draw& draw) {
  weigh_maxima(draw);
  const double target = draw.uniform * weigh_all(draw);
  double below = 0.0;
  int64_t b = 0;
  while (below + draw.work.sums[b] <= target) below += draw.work.sums[b++];
  const double inside = std::min((target - below) / draw.work.sums[b], kBelowOne);
  float buffer[kBlock];
  return b * kBlock + pick(Weights()(draw, b, buffer), kBlock, inside);
}

int64_t draw_above_min_p(const Draw& draw) {
  // Below the bound no weight can be min_p, which is then asked exactly.
  const double least = double(draw.peak) + 1.01 * std::log2(double(draw.min_p)) / draw.scale - 1e-3;
  const int64_t count = gather(draw, Logits(), float(std::max(least, double(kLowest))), INFINITY, draw.work.keys);
  weigh_keys(draw, count);
  return pick_key(draw, count);
}

int64_t draw_of_top_k(const Draw& draw) {
  int64_t count = largest(draw, draw.top_k);
  weigh_keys(draw, count);
  if (draw.top_p < 1.0) count = nucleus_size(draw.work.weights, count, draw.top_p);
  return pick_key(draw, count);
}

// Moves the fewest keys of weights that have the mass to the front; how many they are, or all that there are.
int64_t part(Key* keys, int64_t count, double mass) {
  int64_t first = 0, last = count;  // the nucleus ends between them
  while (last - first > 1) {
    const int64_t middle = first + (last - first) / 2;
    std::nth_element(keys + first, keys + middle, keys + last, Before());
    const double sum = sum_of(keys + first, middle - first);
    if (sum >= mass) {
      last = middle;
    } else {
      first = middle;
      mass -= sum;
    }
  }
  return last;
}

// The keys of the fewest tokens that have the mass, in no order: those of large weights first, which are few.
int64_t nucleus_of(const Draw& draw, double mass) {
  int64_t count = 0;
  for (float least = 0x1p-4f, end = INFINITY;; end = least, least = least > 0x1p-100f ? least * 0x1p-4f : 0.0f) {
    Key* keys = draw.work.keys + count;
    const int64_t more = gather(draw, Weights(), least, end, keys);
    const double sum = sum_of(keys, more);
    if (sum >= mass || least == 0.0f) return count + part(keys, more, mass);
    count += more;
    mass -= sum;
  }
}

// The keys of the nucleus, in no order.
int64_t nucleus(const Draw& draw) {
  weigh_maxima(draw);
  const Bounds total = bounds_of_all(draw);
  // Bounds that are far apart seldom tell anything, and more mass than there may be would be looked for everywhere.
  if (total.most - total.least < 0x1p-6 * total.least && draw.top_p * total.most < total.least) {
    const int64_t count = nucleus_of(draw, draw.top_p * total.most);
    const Key* keys = draw.work.keys;
    const Key last = *std::max_element(keys, keys + count, Before());
    // It has the mass at any rate; is it the smallest that has, too?
    if (sum_of(keys, count) - value_of(last) < draw.top_p * total.least) return count;
  }
  return nucleus_of(draw, draw.top_p * weigh_all(draw));
}

// Orders the keys of a large nucleus by id, but those that tie with the last of it, which end it.
void order_by_id(const Draw& draw, int64_t count) {
  Key* keys = draw.work.keys;
  const Key last = *std::max_element(keys, keys + count, Before()) >> 32;
  Key* ties = std::partition(keys, keys + count, [last](Key key) { return key >> 32 != last; });
  std::sort(ties, keys + count, Before());
  gather(draw, Weights(), std::nextafter(value_of(*ties), INFINITY), INFINITY, keys);
}

int64_t draw_of_nucleus(const Draw& draw) {
  const int64_t count = nucleus(draw);
  if (count <= kMostSorted) {
    std::sort(draw.work.keys, draw.work.keys + count, Before());
  } else {
    order_by_id(draw, count);
  }
  weigh_keys(draw, count);
  return pick_key(draw, count);
}

int64_t token_of(const Draw& draw) {
  if (draw.top_k > 0 && draw.top_k < draw.vocab) return draw_of_top_k(draw);
  if (draw.top_p < 1.0) return draw_of_nucleus(draw);
  return draw.min_p > 0.0f ? draw_above_min_p(draw) : draw_of_all(draw);
}

}  // namespace

void draw_tokens(const DrawTokensArgs& args, Parallel& parallel) {
  parallel.for_each(args.draws, [&](int64_t i) {
    const double temperature = args.temperature[i];
    Draw draw{args.logits + args.row[i] * args.vocab,
              args.vocab,
              0.0f,
              float(temperature > 0.0 ? 1.4426950408889634 / temperature : 0.0),
              args.top_k[i],
              args.top_p[i],
              args.min_p[i],
              double(args.uniform[i]) * 0x1p-53,
              reserve(args.vocab)};
    draw.peak = args.peak[i] =
        find_peak(draw.logits, draw.vocab, [&](int64_t b, float top) { draw.work.maxima[b] = top; });
    if (!std::isfinite(draw.peak)) {
      args.token[i] = -1;
    } else {
      args.token[i] = int32_t(temperature > 0.0 ? token_of(draw) : first_of(draw, draw.peak));
    }
  });
}

}  // namespace SLIPSTREAM_ISA
}  // namespace slipstream
