// ONNX Runtime's view of the CPU plugins: registration, argument checks, and its thread pool behind Parallel.
#include <new>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "operators.h"

namespace slipstream {

namespace ort {

// A failed call of the runtime, kept until it can be handed back to it.
struct Failure {
  Status* status;
};

void check(Status* status) {
  if (status != nullptr) throw Failure{status};
}

// The session's pool behind Parallel. An exception in a task would cross the runtime's C frames, so kernels do not
// throw.
class SessionParallel final : public Parallel {
 public:
  SessionParallel(const Api& api, const KernelContext* context) : api_(api), context_(context) {}

  void run(int64_t n, void (*fn)(void*, int64_t), void* ctx) override {
    if (n == 1) return fn(ctx, 0);
    struct Task {
      void (*fn)(void*, int64_t);
      void* ctx;
    } task{fn, ctx};
    auto call = [](void* user, size_t i) {
      auto* t = static_cast<Task*>(user);
      t->fn(t->ctx, static_cast<int64_t>(i));
    };
    check(api_.parallel_for(context_, call, static_cast<size_t>(n), static_cast<size_t>(n), &task));
  }
  int threads() const override { return session_threads.load(std::memory_order_relaxed); }

 private:
  const Api& api_;
  const KernelContext* context_;
};

struct Tensor {
  void* data = nullptr;
  ElementType type = ElementType::undefined;
  size_t rank = 0;
  int64_t shape[8] = {};

  template <class T>
  T* as() const { return static_cast<T*>(data); }
};

// Inputs and outputs of one call, checked.
class Call {
 public:
  Call(const Api& api, KernelContext* context, const char* op) : api_(api), context_(context), op_(op) {}

  Tensor input(size_t index, const char* name, size_t rank) const {
    Tensor tensor = optional_input(index);
    if (tensor.data == nullptr && tensor.rank == 0) fail(std::string("input ") + name + " is missing");
    if (rank != 0 && tensor.rank != rank)
      fail(std::string("input ") + name + " has rank " + std::to_string(tensor.rank) + ", expected " + std::to_string(rank));
    return tensor;
  }

  Tensor optional_input(size_t index) const {
    const Value* value = nullptr;
    check(api_.input(context_, index, &value));
    return value == nullptr ? Tensor{} : describe(const_cast<Value*>(value));
  }

  float* output(std::initializer_list<int64_t> shape) const {
    Value* value = nullptr;
    check(api_.output(context_, 0, shape.begin(), shape.size(), &value));
    void* data = nullptr;
    check(api_.tensor_data(value, &data));
    return static_cast<float*>(data);
  }

  void expect(bool condition, const char* what) const {
    if (!condition) fail(what);
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw std::invalid_argument(std::string("slipstream.") + op_ + ": " + what);
  }

 private:
  Tensor describe(Value* value) const {
    Tensor tensor;
    TensorInfo* info = nullptr;
    check(api_.tensor_info(value, &info));
    Status* status = api_.element_type(info, &tensor.type);
    if (status == nullptr) status = api_.rank(info, &tensor.rank);
    if (status == nullptr && tensor.rank > 8) status = api_.create_status(kInvalidArgument, "a tensor has more than 8 axes");
    if (status == nullptr) status = api_.dimensions(info, tensor.shape, tensor.rank);
    api_.release_tensor_info(info);
    check(status);
    check(api_.tensor_data(value, &tensor.data));
    return tensor;
  }

  const Api& api_;
  KernelContext* context_;
  const char* op_;
};

int64_t elements(const Tensor& tensor) {
  int64_t n = 1;
  for (size_t i = 0; i < tensor.rank; ++i) n *= tensor.shape[i];
  return n;
}

PackedWeight packed_weight(const Call& call, const Tensor& blob, const LinearSignature::Attributes& a) {
  PackedWeight weight{blob.as<const uint8_t>(), a.in_features, a.out_features, static_cast<int32_t>(a.bits),
                      static_cast<int32_t>(a.group_size), static_cast<ZeroKind>(a.zero_kind),
                      static_cast<int32_t>(a.scale_bytes), static_cast<int32_t>(a.gated)};
  const bool halves = a.group_size == 16 && a.bits == 8 && a.zero_kind == 0 && a.in_features % 32 == 0;
  const bool blocks = a.group_size >= 32 && a.group_size % 32 == 0;
  call.expect((a.gated == 0 || a.gated == 1) && a.zero_kind >= 0 && a.zero_kind <= 2 && (halves || blocks) && a.in_features % a.group_size == 0 &&
                  (a.bits == 4 || a.bits == 8) && (a.scale_bytes == 2 || a.scale_bytes == 4),
              "the attributes describe no packed format");
  call.expect(elements(blob) == packed_bytes(weight), "the packed weight has the wrong size for its attributes");
  return weight;
}

struct LinearOp : LinearSignature {
  static void compute(const Call& call, const Attributes& a, const Kernels& kernels, Parallel& parallel) {
    const Tensor x = call.input(Input::x, "x", 2), blob = call.input(Input::weight, "weight", 1);
    const Tensor bias = call.optional_input(Input::bias), residual = call.optional_input(Input::residual);
    const Tensor norm = call.optional_input(Input::norm_weight);
    LinearArgs args{};
    args.weight = packed_weight(call, blob, a);
    const int64_t rows = x.shape[0], columns = a.out_features / (1 + a.gated);
    call.expect(x.shape[1] == a.in_features, "x does not have in_features columns");
    call.expect(!bias.data || elements(bias) == a.out_features, "bias does not have out_features elements");
    call.expect(!residual.data || elements(residual) == rows * columns, "residual does not have the output's shape");
    call.expect(!norm.data || elements(norm) == a.in_features, "norm_weight does not have in_features elements");
    args.x = x.as<const float>();
    args.rows = rows;
    args.bias = bias.as<const float>();
    args.residual = residual.as<const float>();
    args.norm_weight = norm.as<const float>();
    args.norm_eps = a.norm_eps;
    args.y = call.output({rows, columns});
    if (rows > 0) kernels.linear(args, parallel);
  }
};

struct EmbeddingOp : EmbeddingSignature {
  static void compute(const Call& call, const Attributes& a, const Kernels& kernels, Parallel& parallel) {
    const Tensor ids = call.input(Input::token_ids, "token_ids", 1), blob = call.input(Input::weight, "weight", 1);
    LinearSignature::Attributes format{};
    format.in_features = a.in_features;
    format.out_features = a.out_features;
    format.bits = a.bits;
    format.group_size = a.group_size;
    format.zero_kind = a.zero_kind;
    format.scale_bytes = a.scale_bytes;
    EmbeddingArgs args{};
    args.weight = packed_weight(call, blob, format);
    args.token_ids = ids.as<const int32_t>();
    args.rows = ids.shape[0];
    for (int64_t i = 0; i < args.rows; ++i)
      call.expect(args.token_ids[i] >= 0 && args.token_ids[i] < a.out_features, "a token id is outside the vocabulary");
    args.y = call.output({args.rows, a.in_features});
    if (args.rows > 0) kernels.embedding(args, parallel);
  }
};

struct PagedAttentionOp : PagedAttentionSignature {
  static KVType kv_type(const Call& call, ElementType type) {
    switch (type) {
      case ElementType::float32: return KVType::f32;
      case ElementType::float16: return KVType::f16;
      case ElementType::int8: return KVType::i8;
      case ElementType::float8e4m3fn: return KVType::e4m3;
      default: call.fail("kv_cache must be float32, float16, int8 or float8e4m3fn");
    }
  }

  // A wrong page would be read or written outside the cache, so every one that the step uses is checked.
  static void check_pages(const Call& call, const PagedAttentionArgs& args) {
    call.expect(args.query_start[0] == 0 && args.query_start[args.sequences] == args.tokens, "query_start does not cover the tokens");
    for (int64_t t = 0; t < args.tokens; ++t)
      call.expect(args.slot_mapping[t] >= 0 && args.slot_mapping[t] < args.num_pages * args.page_size, "a slot is outside kv_cache");
    for (int64_t s = 0; s < args.sequences; ++s) {
      const int64_t length = args.context_len[s], used = (length + args.page_size - 1) / args.page_size;
      const int64_t queries = args.query_start[s + 1] - args.query_start[s];
      call.expect(queries >= 0 && queries <= length && used <= args.max_pages, "context_len does not fit its queries or page_table");
      for (int64_t p = 0; p < used; ++p) {
        const int32_t page = args.page_table[s * args.max_pages + p];
        call.expect(page >= 0 && page < args.num_pages, "page_table names a page outside kv_cache");
      }
    }
  }

  static void compute(const Call& call, const Attributes& a, const Kernels& kernels, Parallel& parallel) {
    const Tensor qkv = call.input(Input::qkv, "qkv", 2), cos = call.input(Input::cos, "cos", 2);
    const Tensor sin = call.input(Input::sin, "sin", 2), kv = call.input(Input::kv_cache, "kv_cache", 5);
    const Tensor query_start = call.input(Input::query_start, "query_start", 1);
    const Tensor context_len = call.input(Input::context_len, "context_len", 1);
    const Tensor page_table = call.input(Input::page_table, "page_table", 2);
    const Tensor slots = call.input(Input::slot_mapping, "slot_mapping", 1);
    const Tensor scales = call.optional_input(Input::kv_scales), q_norm = call.optional_input(Input::q_norm);
    const Tensor k_norm = call.optional_input(Input::k_norm), sinks = call.optional_input(Input::sinks);
    const int64_t tokens = qkv.shape[0], sequences = context_len.shape[0];
    call.expect(qkv.shape[1] == (a.num_heads + 2 * a.num_kv_heads) * a.head_dim, "qkv does not have all heads");
    call.expect(cos.shape[0] == tokens && sin.shape[0] == tokens && cos.shape[1] == sin.shape[1], "cos and sin do not fit qkv");
    call.expect(a.layer >= 0 && a.layer < kv.shape[0], "layer is outside kv_cache");
    call.expect(kv.shape[2] == 2 && kv.shape[3] == a.num_kv_heads && kv.shape[4] == a.page_size * a.head_dim,
                "kv_cache does not have the shape that the attributes say");
    call.expect(query_start.shape[0] == sequences + 1 && page_table.shape[0] == sequences && slots.shape[0] == tokens,
                "the step's inputs do not fit each other");
    call.expect(a.num_heads > 0 && a.num_kv_heads > 0 && a.page_size > 0 && a.head_dim > 0, "sizes must be positive");
    call.expect(a.head_dim % 8 == 0 && a.head_dim <= 256, "head_dim must be a multiple of 8, at most 256");
    call.expect(a.page_size % 16 == 0, "page_size must be a multiple of 16");
    call.expect(a.num_heads % a.num_kv_heads == 0, "num_kv_heads must divide num_heads");
    call.expect(2 * cos.shape[1] <= a.head_dim, "more of a head is rotated than it has");
    call.expect(kv.type != ElementType::int8 ||
                    elements(scales) == kv.shape[0] * kv.shape[1] * 2 * a.num_kv_heads * a.page_size,
                "int8 pages need kv_scales, one for each token and head");
    call.expect(!q_norm.data || elements(q_norm) == a.head_dim, "q_norm does not have head_dim elements");
    call.expect(!k_norm.data || elements(k_norm) == a.head_dim, "k_norm does not have head_dim elements");
    call.expect(!sinks.data || elements(sinks) == a.num_heads, "sinks does not have num_heads elements");
    PagedAttentionArgs args{};
    args.qkv = qkv.as<const float>();
    args.cos = cos.as<const float>();
    args.sin = sin.as<const float>();
    args.kv_cache = kv.data;
    args.kv_scales = scales.as<float>();
    args.query_start = query_start.as<const int32_t>();
    args.context_len = context_len.as<const int32_t>();
    args.page_table = page_table.as<const int32_t>();
    args.slot_mapping = slots.as<const int32_t>();
    args.q_norm = q_norm.as<const float>();
    args.k_norm = k_norm.as<const float>();
    args.sinks = sinks.as<const float>();
    args.tokens = tokens;
    args.sequences = sequences;
    args.max_pages = page_table.shape[1];
    args.num_pages = kv.shape[1];
    args.rotary_half = cos.shape[1];
    args.layer = a.layer;
    args.num_heads = a.num_heads;
    args.num_kv_heads = a.num_kv_heads;
    args.head_dim = a.head_dim;
    args.page_size = a.page_size;
    args.sliding_window = a.sliding_window;
    args.kv_type = kv_type(call, kv.type);
    args.k_scale = args.kv_type == KVType::e4m3 ? a.k_scale : 1.0f;
    args.v_scale = args.kv_type == KVType::e4m3 ? a.v_scale : 1.0f;
    call.expect(args.k_scale > 0 && args.v_scale > 0, "k_scale and v_scale must be positive");
    args.scale = a.scale;
    args.soft_cap = a.soft_cap;
    args.norm_eps = a.norm_eps;
    check_pages(call, args);
    args.output = call.output({tokens, a.num_heads * a.head_dim});
    if (tokens > 0) kernels.paged_attention(args, parallel);
  }
};

// One OrtCustomOp from a signature and its compute function.
template <class Op>
struct Registered : CustomOp {
  struct Kernel {
    Api api;
    typename Op::Attributes attributes;
  };

  Registered() : CustomOp{} {
    version = kApiVersion;
    GetName = [](const CustomOp*) { return Op::name; };
    GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };
    GetInputTypeCount = [](const CustomOp*) { return Op::input_count; };
    GetOutputTypeCount = [](const CustomOp*) { return Op::output_count; };
    GetInputType = [](const CustomOp*, size_t i) { return Op::tensors[i].type; };
    GetOutputType = [](const CustomOp*, size_t i) { return Op::tensors[Op::input_count + i].type; };
    GetInputCharacteristic = [](const CustomOp*, size_t i) { return Op::tensors[i].characteristic; };
    GetOutputCharacteristic = [](const CustomOp*, size_t i) { return Op::tensors[Op::input_count + i].characteristic; };
    GetInputMemoryType = [](const CustomOp*, size_t) { return kCpuMemory; };
    GetVariadicInputMinArity = [](const CustomOp*) { return 1; };
    GetVariadicInputHomogeneity = [](const CustomOp*) { return 1; };
    GetVariadicOutputMinArity = [](const CustomOp*) { return 1; };
    GetVariadicOutputHomogeneity = [](const CustomOp*) { return 1; };
    GetStartVersion = [](const CustomOp*) { return 1; };
    GetEndVersion = [](const CustomOp*) { return 1; };
    CreateKernelV2 = &create;
    KernelComputeV2 = &compute;
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  }

  static Status* create(const CustomOp*, const void* table, const KernelInfo* info, void** out) {
    const Api api(static_cast<const void* const*>(table));
    auto* kernel = new (std::nothrow) Kernel{api, {}};
    if (kernel == nullptr) return api.create_status(kInvalidArgument, "slipstream: out of memory");
    if (Status* status = kernel->attributes.read(api, info)) {
      delete kernel;
      return status;
    }
    *out = kernel;
    return nullptr;
  }

  static Status* compute(void* opaque, KernelContext* context) {
    const auto* kernel = static_cast<const Kernel*>(opaque);
    try {
      SessionParallel parallel(kernel->api, context);
      Op::compute(Call(kernel->api, context, Op::name), kernel->attributes, all_kernels().front(), parallel);
      return nullptr;
    } catch (const Failure& failure) {
      return failure.status;
    } catch (const std::exception& error) {
      return kernel->api.create_status(kInvalidArgument, error.what());
    }
  }
};

Status* register_all(const Api& api, SessionOptions* options) {
  static const Registered<LinearOp> linear;
  static const Registered<EmbeddingOp> embedding;
  static const Registered<PagedAttentionOp> paged_attention;
  // The domain must outlive the sessions that use it, so it is made once and never released.
  static CustomOpDomain* domain = nullptr;
  if (domain == nullptr) {
    CustomOpDomain* made = nullptr;
    if (Status* status = api.create_domain("slipstream", &made)) return status;
    for (const CustomOp* op : {static_cast<const CustomOp*>(&linear), static_cast<const CustomOp*>(&embedding),
                               static_cast<const CustomOp*>(&paged_attention)})
      if (Status* status = api.domain_add(made, op)) return status;
    domain = made;
  }
  return api.add_domain(options, domain);
}

}  // namespace ort

}  // namespace slipstream

// The symbol that SessionOptions.register_custom_ops_library looks up.
SLIPSTREAM_EXPORT slipstream::ort::Status* RegisterCustomOps(slipstream::ort::SessionOptions* options,
                                                             const slipstream::ort::ApiBase* base) {
  const void* const* table = base->GetApi(slipstream::ort::kApiVersion);
  if (table == nullptr) {
    // An older runtime has no status to offer for a version it does not know; version 1 has CreateStatus.
    const slipstream::ort::Api oldest(base->GetApi(1));
    return oldest.create_status(slipstream::ort::kInvalidArgument,
                                "Slipstream's CPU plugins need onnxruntime 1.18 or newer: pip install -U onnxruntime");
  }
  return slipstream::ort::register_all(slipstream::ort::Api(table), options);
}
