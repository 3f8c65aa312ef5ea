// Calls every operator of the library as ONNX Runtime does, with attributes, shapes and values that are right or not.
//
// Half of the calls are right and must succeed. The others are right but for a few changes: they must be refused, or
// computed in bounds, for which tensors are allocated to the byte and everything is built with sanitizers. Usage: fuzz
// [TURNS [SEED]]; a turn calls every operator once, with the next instruction set.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <variant>
#include <vector>

#include "collectives/cpu/ranks.h"
#include "cpu/kernels.h"
#include "cpu/ort_abi.h"
#include "linear/cpu/weight.h"

namespace slipstream::ort {

struct Status {
  std::string text;
};

struct Value {
  ElementType type;
  std::vector<int64_t> shape;
  std::unique_ptr<char[]> data;
};

struct KernelInfo {
  std::map<std::string, std::variant<int64_t, float>> attributes;
};

struct KernelContext {
  std::vector<std::optional<Value>> inputs;
  std::map<size_t, Value> outputs;
};

struct CustomOpDomain {
  std::map<std::string, const CustomOp*> operators;
};

struct SessionOptions {
  CustomOpDomain* domain;
};

}  // namespace slipstream::ort

extern "C" slipstream::ort::Status* RegisterCustomOps(slipstream::ort::SessionOptions*, const slipstream::ort::ApiBase*);

namespace {

using namespace slipstream;
using namespace slipstream::ort;

constexpr int64_t kMostBytes = 1 << 28;  // of a tensor; a runtime would fail to allocate more

int64_t bytes_of(ElementType type) {
  switch (type) {
    case ElementType::float32: case ElementType::int32: return 4;
    case ElementType::int64: return 8;
    case ElementType::float16: return 2;
    default: return 1;
  }
}

// Elements, or -1 for more than fit.
int64_t elements_of(const std::vector<int64_t>& shape) {
  for (const int64_t size : shape)
    if (size == 0) return 0;
  int64_t n = 1;
  for (const int64_t size : shape)
    if (size < 0 || __builtin_mul_overflow(n, size, &n) || n > kMostBytes / 8) return -1;
  return n;
}

// The runtime's side, one function a slot of its table.

Status* fail(std::string text) { return new Status{std::move(text)}; }
Status* create_status(int, const char* text) { return fail(text); }
const char* message(const Status* status) { return status->text.c_str(); }
void release_status(Status* status) { delete status; }

Status* create_domain(const char*, CustomOpDomain** out) {
  static CustomOpDomain domain;
  *out = &domain;
  return nullptr;
}

Status* domain_add(CustomOpDomain* domain, const CustomOp* op) {
  domain->operators[op->GetName(op)] = op;
  return nullptr;
}

Status* add_domain(SessionOptions* options, CustomOpDomain* domain) {
  options->domain = domain;
  return nullptr;
}

template <class T>
Status* attribute(const KernelInfo* info, const char* name, T* out) {
  const auto found = info->attributes.find(name);
  if (found == info->attributes.end()) return fail("there is no '" + std::string(name) + "'");
  if (!std::holds_alternative<T>(found->second)) return fail("of another type is '" + std::string(name) + "'");
  *out = std::get<T>(found->second);
  return nullptr;
}

Status* tensor_data(Value* value, void** out) {
  *out = value->data.get();
  return nullptr;
}

Status* type_and_shape(const Value* value, ElementType* type, const int64_t** shape, size_t* rank) {
  *type = value->type;
  *shape = value->shape.data();
  *rank = value->shape.size();
  return nullptr;
}

Status* input(const KernelContext* context, size_t index, const Value** out) {
  const auto& inputs = context->inputs;
  *out = index < inputs.size() && inputs[index] ? &*inputs[index] : nullptr;
  return nullptr;
}

Status* output(KernelContext* context, size_t index, const int64_t* shape, size_t rank, Value** out) {
  Value value{ElementType::float32, {shape, shape + rank}, nullptr};
  const int64_t n = elements_of(value.shape);
  if (n < 0) return fail("out of memory");
  value.data.reset(new char[size_t(n * 4)]);
  *out = &(context->outputs[index] = std::move(value));
  return nullptr;
}

Status* parallel_for(const KernelContext*, void (*task)(void*, size_t), size_t total, size_t, void* user) {
  for (size_t i = 0; i < total; ++i) task(user, i);
  return nullptr;
}

const void* const* table(uint32_t) {
  static const void* slots[415] = {};
  const auto set = [](int slot, auto* function) { slots[slot] = reinterpret_cast<const void*>(function); };
  set(0, create_status), set(2, message), set(26, create_domain), set(27, domain_add), set(28, add_domain);
  set(51, tensor_data), set(414, type_and_shape);
  set(85, attribute<float>), set(86, attribute<int64_t>), set(90, input), set(91, output);
  set(93, release_status), set(274, parallel_for);
  return slots;
}

// One call, and how to change it.

struct Case {
  KernelInfo info;
  KernelContext context;
};

class Random {
 public:
  explicit Random(uint64_t seed) : bits_(seed) {}

  int64_t in(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(bits_); }
  bool one_in(int64_t n) { return in(1, n) == 1; }
  template <class T>
  T of(std::initializer_list<T> values) { return values.begin()[in(0, int64_t(values.size()) - 1)]; }

  float real(uint64_t noise) {
    if (noise >> 32 & 255) return float(int16_t(noise)) / 8192;
    return of({0.0f, -0.0f, 1e38f, -1e38f, 1e-40f, INFINITY, -INFINITY, NAN});
  }

  int64_t hostile(int64_t right) {
    const int64_t one = 1;
    const uint64_t bits = uint64_t(right);
    return of({int64_t(0), int64_t(-1), int64_t(bits - 1), int64_t(bits + 1), int64_t(2 * bits), one << 16, one << 31, one << 32, one << 60,
               (one << 60) + 32, (one << 62) + 16, INT64_MAX, INT64_MIN, in(-1000, 1000)});
  }

  Value tensor(ElementType type, std::vector<int64_t> shape, int64_t below = 1) {
    Value value{type, std::move(shape), nullptr};
    fill(value, below);
    return value;
  }

  std::optional<Value> maybe(ElementType type, std::vector<int64_t> shape) {
    if (one_in(2)) return std::nullopt;
    return tensor(type, std::move(shape));
  }

  // Allocates a tensor to the byte. Integers are from 0 to below `below`.
  void fill(Value& value, int64_t below) {
    const int64_t n = elements_of(value.shape);
    value.data.reset(new char[size_t(n * bytes_of(value.type))]);
    for (int64_t i = 0; i < n; ++i) {
      char* at = value.data.get() + i * bytes_of(value.type);
      const uint64_t noise = bits_();
      const float number = real(noise);
      const int32_t index = int32_t(noise % uint64_t(std::max<int64_t>(below, 1)));
      const void* from = &noise;
      if (value.type == ElementType::float32) from = &number;
      if (value.type == ElementType::int32) from = &index;
      std::memcpy(at, from, size_t(bytes_of(value.type)));
    }
  }

 private:
  std::mt19937_64 bits_;
};

using Type = ElementType;

void put(Value& value, int64_t index, int64_t number) {
  const int32_t narrow = int32_t(number);
  std::memcpy(value.data.get() + 4 * index, &narrow, 4);
}

// Attributes of a weight, and the bytes that it takes.
int64_t weight(Random& random, Case& made, int64_t& n, int64_t& k, bool gated) {
  if (random.one_in(3)) {
    k = random.in(1, 300);
    n = random.in(1, 70);
    const int64_t type = random.of({kBFloat16Type, kFloat16Type, kFloat32Type});
    made.info.attributes = {{"in_features", k}, {"out_features", n}, {"weight_type", type}};
    const DenseWeight dense{nullptr, k, n, type, gated};
    return dense.stride() * dense.tiles();
  }
  const int64_t group = random.of<int64_t>({16, 32, 64, 96});
  k = group * random.in(1, 3) * (group == 16 ? 2 : 1);
  n = random.in(1, 70);
  const int64_t zero = group == 16 ? 0 : random.in(0, 3);
  const bool float4 = ZeroKind(zero) == ZeroKind::float4;
  const int64_t bits = group == 16 ? 8 : float4 ? 4 : random.of<int64_t>({4, 8});
  const int64_t scale_bytes = random.of<int64_t>({2, 4});
  auto& attributes = made.info.attributes;
  attributes = {{"in_features", k}, {"out_features", n}, {"bits", bits}, {"group_size", group},
                {"zero_kind", float4 ? 0 : zero}, {"scale_bytes", scale_bytes}, {"activation", int64_t(4)},
                {"weight_type", int64_t(float4 ? kFloat4Type : 0)}};
  return packed_bytes({nullptr, k, n, int32_t(bits), int32_t(group), ZeroKind(zero), int32_t(scale_bytes), gated});
}

Case linear(Random& random) {
  Case made;
  int64_t n = 0, k = 0;
  const int64_t tokens = random.in(0, 20);
  const bool gated = random.one_in(3);
  const int64_t bytes = weight(random, made, n, k, gated);
  made.info.attributes["gated"] = int64_t(gated);
  made.info.attributes["norm_eps"] = 1e-5f;
  auto& inputs = made.context.inputs;
  inputs.push_back(random.tensor(Type::float32, {tokens, k}));
  inputs.push_back(random.tensor(Type::uint8, {bytes}));
  inputs.push_back(random.maybe(Type::float32, {n}));
  inputs.push_back(random.maybe(Type::float32, {tokens, gated ? n / 2 : n}));
  inputs.push_back(random.maybe(Type::float32, {k}));
  return made;
}

Case embedding(Random& random) {
  Case made;
  int64_t n = 0, k = 0;
  const int64_t bytes = weight(random, made, n, k, false);
  made.context.inputs.push_back(random.tensor(Type::int32, {random.in(0, 20)}, n));
  made.context.inputs.push_back(random.tensor(Type::uint8, {bytes}));
  return made;
}

Case router(Random& random) {
  Case made;
  const int64_t groups = random.in(1, 4), experts = groups * random.in(2, 20), top_groups = random.in(1, groups);
  const int64_t top_k = random.in(1, experts / groups * top_groups), tokens = random.in(0, 40);
  made.info.attributes = {{"top_k", top_k}, {"scoring", random.in(0, 1)}, {"renormalize", random.in(0, 1)},
                          {"scale", 1.5f}, {"groups", groups}, {"top_groups", top_groups}};
  made.context.inputs.push_back(random.tensor(Type::float32, {tokens, experts}));
  made.context.inputs.push_back(random.maybe(Type::float32, {experts}));
  return made;
}

constexpr int64_t kRanks = 2;
alignas(64) char rank_memory[kRanks * (64 + 2 * 256)];

// The first of two ranks; the other one is always there before it, and gives zeros.
bool join_ranks() {
  reinterpret_cast<slipstream::RankLine*>(rank_memory)[1].turn = INT32_MAX;
  return slipstream_join_ranks(rank_memory, sizeof(rank_memory), 0, kRanks) == 0;
}

Case collective(Random& random) {
  Case made;
  made.info.attributes = {{"ranks", kRanks}};
  made.context.inputs.push_back(random.tensor(Type::float32, {random.in(0, 20), random.in(1, 200)}));
  return made;
}

Case expert_linear(Random& random) {
  Case made;
  int64_t n = 0, k = 0, bytes = 0;
  const int64_t experts = random.in(1, 6), top_k = random.in(1, 4), tokens = random.in(0, 12);
  const bool reduce = random.one_in(2), gated = !reduce && random.one_in(2);
  do {
    bytes = weight(random, made, n, k, gated);
  } while (gated && n % 2 != 0);  // as many gate rows as up rows
  auto& attributes = made.info.attributes;
  attributes["experts"] = experts;
  attributes["top_k"] = top_k;
  attributes["reduce"] = int64_t(reduce);
  attributes["gated"] = int64_t(gated);
  attributes["gate"] = random.in(0, 2);
  auto& inputs = made.context.inputs;
  inputs.push_back(random.tensor(Type::float32, {reduce ? tokens * top_k : tokens, k}));
  inputs.push_back(random.tensor(Type::uint8, {experts * bytes}));
  inputs.push_back(random.tensor(Type::int32, {tokens, top_k}, experts));
  inputs.push_back(reduce ? std::optional(random.tensor(Type::float32, {tokens, top_k})) : std::nullopt);
  inputs.push_back(random.maybe(Type::float32, {experts * n}));
  inputs.push_back(reduce ? random.maybe(Type::float32, {tokens, n}) : std::nullopt);
  return made;
}

Case top_token(Random& random) {
  Case made;
  const int64_t vocab = random.one_in(8) ? 40000 : random.in(1, 200);
  made.context.inputs.push_back(random.tensor(Type::float32, {random.in(0, 4), vocab}));
  return made;
}

Case draw_tokens(Random& random) {
  Case made;
  const int64_t rows = random.in(1, 3), vocab = random.one_in(8) ? 5000 : random.in(1, 200), draws = random.in(0, 6);
  auto& inputs = made.context.inputs;
  inputs.push_back(random.tensor(Type::float32, {rows, vocab}));
  inputs.push_back(random.tensor(Type::int32, {draws}, rows));
  inputs.push_back(random.tensor(Type::float32, {draws}));
  inputs.push_back(random.tensor(Type::int32, {draws}, random.in(1, 2 * vocab)));
  inputs.push_back(random.tensor(Type::float32, {draws}));
  inputs.push_back(random.tensor(Type::float32, {draws}));
  inputs.push_back(random.tensor(Type::int64, {draws}));
  for (int64_t i = 0; i < draws; ++i) {
    const float temperature = random.of({0.0f, 1e-5f, 0.7f, 30.0f}), min_p = random.of({0.0f, 0.1f, 1.0f});
    std::memcpy(inputs[2]->data.get() + 4 * i, &temperature, 4);
    std::memcpy(inputs[5]->data.get() + 4 * i, &min_p, 4);
    const int64_t uniform = random.in(0, (int64_t(1) << 53) - 1);
    std::memcpy(inputs[6]->data.get() + 8 * i, &uniform, 8);
  }
  return made;
}

Case paged_attention(Random& random) {
  Case made;
  const int64_t kv_heads = random.in(1, 3), heads = kv_heads * random.in(1, 4), dim = 8 * random.in(1, 9);
  const int64_t page = 16 * random.in(1, 3), layers = random.in(1, 2), half = random.in(0, dim / 2);
  const int64_t parts = random.in(0, 2);
  const Type type = random.of({Type::float32, Type::float16, Type::int8, Type::uint8, Type::float8e4m3fn});
  const int64_t planes = type == Type::uint8 ? 3 : 2;
  const int64_t sequences = random.in(0, 4), longest = random.one_in(20) ? 3000 : 200;
  std::vector<int64_t> starts{0}, lengths;
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t queries = random.one_in(3) ? random.in(0, 60) : random.in(0, 2);
    starts.push_back(starts.back() + queries);
    lengths.push_back(queries + random.in(0, longest));
  }
  const int64_t tokens = starts.back(), pages = random.in(1, 6);
  int64_t columns = random.in(0, 2);
  for (const int64_t length : lengths) columns = std::max(columns, (length + page - 1) / page);
  made.info.attributes = {
      {"layer", random.in(0, layers - 1)}, {"num_heads", heads}, {"num_kv_heads", kv_heads}, {"head_dim", dim},
      {"page_size", page}, {"scale", 0.2f}, {"sliding_window", random.one_in(2) ? 0 : random.in(1, 90)},
      {"soft_cap", random.one_in(2) ? 0.0f : 5.0f}, {"norm_eps", 1e-6f}, {"k_scale", 0.5f}, {"v_scale", 2.0f},
      {"kv_parts", parts}, {"v_norm", random.in(0, 1)}};
  auto& inputs = made.context.inputs;
  inputs.push_back(random.tensor(Type::float32, {tokens, (heads + parts * kv_heads) * dim}));
  inputs.push_back(random.tensor(Type::float32, {tokens, half}));
  inputs.push_back(random.tensor(Type::float32, {tokens, half}));
  inputs.push_back(random.tensor(type, {layers, pages, planes, kv_heads, page * dim}));
  inputs.push_back(random.tensor(Type::int32, {sequences + 1}));
  inputs.push_back(random.tensor(Type::int32, {sequences}));
  for (int64_t s = 0; s <= sequences; ++s) put(*inputs[4], s, starts[size_t(s)]);
  for (int64_t s = 0; s < sequences; ++s) put(*inputs[5], s, lengths[size_t(s)]);
  inputs.push_back(random.tensor(Type::int32, {sequences, columns}, pages));
  inputs.push_back(random.tensor(Type::int32, {tokens}, pages * page));
  const bool scaled = type == Type::int8 || type == Type::uint8;
  inputs.push_back(scaled ? std::optional(random.tensor(Type::float32, {layers, pages, 2, kv_heads, page}))
                          : std::nullopt);
  inputs.push_back(random.maybe(Type::float32, {dim}));
  inputs.push_back(random.maybe(Type::float32, {dim}));
  inputs.push_back(random.maybe(Type::float32, {heads}));
  return made;
}

void change_attribute(Random& random, KernelInfo& info) {
  auto at = info.attributes.begin();
  std::advance(at, random.in(0, int64_t(info.attributes.size()) - 1));
  if (random.one_in(10)) {
    info.attributes.erase(at);
  } else if (auto* whole = std::get_if<int64_t>(&at->second)) {
    if (random.one_in(10)) at->second = 1.5f;
    else *whole = random.hostile(*whole);
  } else {
    at->second = random.of({0.0f, -1.0f, 1e38f, INFINITY, NAN});
  }
}

void change_shape(Random& random, Value& value) {
  auto& shape = value.shape;
  const int64_t last = int64_t(shape.size()) - 1;
  if (last < 0 || random.one_in(10)) {
    shape.push_back(random.in(0, 2));
  } else if (random.one_in(10)) {
    shape.pop_back();
  } else {
    int64_t& size = shape[size_t(random.in(0, last))];
    size = random.one_in(2) ? size + random.in(-1, 1) : std::abs(random.hostile(size) / 2);
    if (size < 0) size = 0;
  }
  // An axis of any length is possible beside one of none; all others are to fit into memory.
  if (elements_of(shape) < 0) shape[size_t(random.in(0, int64_t(shape.size()) - 1))] = 0;
}

void change_values(Random& random, Value& value) {
  const int64_t n = elements_of(value.shape);
  if (value.type != Type::int32 || n == 0) return;
  const int64_t index = random.in(0, n - 1);
  int32_t right = 0;
  std::memcpy(&right, value.data.get() + 4 * index, 4);
  put(value, index, random.one_in(2) ? right + random.in(-2, 2) : random.hostile(right) >> random.of({0, 0, 1, 32}));
}

// Whether a runtime would pass this on: a graph whose types are not those declared is refused when it is loaded.
bool declared(const CustomOp& op, const Case& made) {
  for (size_t i = 0; i < made.context.inputs.size(); ++i) {
    const Type type = op.GetInputType(&op, i);
    const auto& value = made.context.inputs[i];
    if (!value && op.GetInputCharacteristic(&op, i) == Characteristic::required) return false;
    if (value && type != Type::undefined && value->type != type) return false;
  }
  return true;
}

void change(Random& random, Case& made) {
  auto& inputs = made.context.inputs;
  for (int64_t left = random.in(1, 3); left > 0; --left) {
    auto& value = inputs[size_t(random.in(0, int64_t(inputs.size()) - 1))];
    const int64_t kind = random.in(0, 9);
    if (kind < 4 && !made.info.attributes.empty()) {
      change_attribute(random, made.info);
    } else if (!value) {
      value = random.tensor(Type::float32, {random.in(0, 9)});
    } else if (kind < 6) {
      change_shape(random, *value);
      random.fill(*value, random.in(1, 100));
    } else if (kind == 6) {
      value->type = random.of({Type::float32, Type::int32, Type::float16, Type::int8, Type::float8e4m3fn});
      random.fill(*value, random.in(1, 100));
    } else if (kind == 7) {
      value.reset();
    } else {
      change_values(random, *value);
    }
  }
}

// What is wrong with a call, or an empty text.
std::string call(const CustomOp& op, const Api& api, const void* slots, Case& made) {
  void* kernel = nullptr;
  Status* status = op.CreateKernelV2(&op, slots, &made.info, &kernel);
  if (status == nullptr) {
    status = op.KernelComputeV2(kernel, &made.context);
    op.KernelDestroy(kernel);
  }
  if (status == nullptr) return "";
  const std::string text = api.message(status);
  api.release_status(status);
  return text;
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t turns = argc > 1 ? std::atoll(argv[1]) : 4000;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : std::random_device()();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  const ApiBase base{table, nullptr};
  SessionOptions options{};
  if (RegisterCustomOps(&options, &base) != nullptr || !join_ranks()) return 1;
  const Api api(table(kApiVersion));
  const std::map<std::string, std::function<Case(Random&)>> cases{
      {"Linear", linear}, {"Embedding", embedding}, {"PagedAttention", paged_attention}, {"Router", router},
      {"ExpertLinear", expert_linear}, {"DrawTokens", draw_tokens}, {"TopToken", top_token}, {"AllReduce", collective},
      {"AllGather", collective}};
  if (cases.size() != options.domain->operators.size()) {
    std::printf("an operator of the library has no cases here\n");
    return 1;
  }
  Random random(seed);
  std::map<std::string, int64_t> right, changed, refused;
  for (int64_t turn = 0; turn < turns; ++turn) {
    std::rotate(all_kernels().begin(), all_kernels().begin() + 1, all_kernels().end());
    for (const auto& [name, make] : cases) {
      const CustomOp& op = *options.domain->operators.at(name);
      const std::string which = name + " " + all_kernels().front().isa;
      session_threads = int(random.in(1, 8));
      Case made = make(random);
      const bool is_right = random.one_in(2);
      if (!is_right) change(random, made);
      if (!declared(op, made)) continue;
      const std::string problem = call(op, api, table(kApiVersion), made);
      if (is_right && !problem.empty()) {
        std::printf("%s refuses what is right: %s\n", which.c_str(), problem.c_str());
        return 1;
      }
      ++(is_right ? right : problem.empty() ? changed : refused)[which];
    }
  }
  for (const auto& [which, count] : right)
    std::printf("%s: %lld right, %lld changed and computed, %lld refused\n", which.c_str(), (long long)count,
                (long long)changed[which], (long long)refused[which]);
  return 0;
}
