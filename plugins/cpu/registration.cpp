// ONNX Runtime's view of a library of operators: registration, and the runtime's thread pool behind Parallel. What it
// knows of each operator is generated from its spec.
#include <new>

#include "signatures.h"

namespace slipstream {

namespace ort {

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
    expect_ok(api_.parallel_for(context_, call, static_cast<size_t>(n), static_cast<size_t>(n), &task));
  }
  int threads() const override { return session_threads.load(std::memory_order_relaxed); }

 private:
  const Api& api_;
  const KernelContext* context_;
};

// Runs f, and tells the runtime what it threw.
template <class F>
Status* guarded(const Api& api, const char* op, F&& f) {
  try {
    f();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::exception& error) {
    const std::string text = std::string(kDomain) + "." + op + ": " + error.what();
    return api.create_status(kInvalidArgument, text.c_str());
  }
}

// Operators whose specs say nothing of a check of their own have none.
template <class Args>
const char* check(const Args&) {
  return nullptr;
}

// One OrtCustomOp from a signature.
template <class Op>
struct Registered : CustomOp {
  struct Kernel {
    Api api;
    typename Op::Args attributes;
  };

  Registered() : CustomOp{} {
    version = kCustomOpVersion;
    GetName = [](const CustomOp*) { return Op::name; };
    GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };
    GetInputTypeCount = [](const CustomOp*) { return std::size(Op::inputs); };
    GetOutputTypeCount = [](const CustomOp*) { return std::size(Op::outputs); };
    GetInputType = [](const CustomOp*, size_t i) { return Op::inputs[i].type; };
    GetOutputType = [](const CustomOp*, size_t i) { return Op::outputs[i].type; };
    GetInputCharacteristic = [](const CustomOp*, size_t i) { return Op::inputs[i].characteristic; };
    GetOutputCharacteristic = [](const CustomOp*, size_t i) { return Op::outputs[i].characteristic; };
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
    Status* status = guarded(api, Op::name, [&] { Op::attributes(Node(api, info), kernel->attributes); });
    if (status == nullptr) {
      *out = kernel;
    } else {
      delete kernel;
    }
    return status;
  }

  static Status* compute(void* opaque, KernelContext* context) {
    const auto* kernel = static_cast<const Kernel*>(opaque);
    return guarded(kernel->api, Op::name, [&] {
      const Call call(kernel->api, context);
      typename Op::Args args = kernel->attributes;
      Op::fill(call, args);
      if (const char* problem = check(args)) throw std::invalid_argument(problem);
      if (!Op::make_outputs(call, args)) return;
      SessionParallel parallel(kernel->api, context);
      Op::kernel(all_kernels().front())(args, parallel);
    });
  }
};

template <class Op>
Status* add(const Api& api, CustomOpDomain* domain) {
  static const Registered<Op> op;
  return api.domain_add(domain, &op);
}

template <class... Op>
Status* add_all(const Api& api, CustomOpDomain* domain, List<Op...>) {
  Status* status = nullptr;
  ((status = status == nullptr ? add<Op>(api, domain) : status), ...);
  return status;
}

Status* register_all(const Api& api, SessionOptions* options) {
  // The domain must outlive the sessions that use it, so it is made once and never released.
  static CustomOpDomain* domain = nullptr;
  if (domain == nullptr) {
    CustomOpDomain* made = nullptr;
    if (Status* status = api.create_domain(kDomain, &made)) return status;
    if (Status* status = add_all(api, made, Signatures{})) return status;
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
                                "Slipstream's CPU plugins need onnxruntime 1.24 or newer: pip install -U onnxruntime");
  }
  return slipstream::ort::register_all(slipstream::ort::Api(table), options);
}
