// The few entries of ONNX Runtime's C API that custom operators need.
//
// The ONNX Runtime wheel ships no headers. Its C ABI is append-only: OrtApiBase::GetApi(version) returns a
// table of function pointers whose first entries never move, so an entry is named by its slot. Slots and
// signatures are those of onnxruntime_c_api.h at ORT_API_VERSION 24, by which the table is asked for, the oldest version
// that is supported: GetApi returns null when the loaded runtime is older, which registration.cpp reports.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/elements.h"

namespace slipstream::ort {

constexpr uint32_t kApiVersion = 24;       // of ONNX Runtime 1.24, the floor in pyproject.toml
constexpr uint32_t kCustomOpVersion = 18;  // of CustomOp below

struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct ShapeInferContext;

enum class Characteristic : int { required = 0, optional = 1, variadic = 2 };
constexpr int kInvalidArgument = 2;  // OrtErrorCode ORT_INVALID_ARGUMENT
constexpr int kCpuMemory = 0;        // OrtMemTypeDefault

struct ApiBase {
  const void* const* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

struct CustomOp;

class Api {
 public:
  explicit Api(const void* const* table = nullptr) : table_(table) {}

  Status* create_status(int code, const char* message) const {
    return slot<Status*(int, const char*)>(0)(code, message);
  }
  const char* message(const Status* status) const { return slot<const char*(const Status*)>(2)(status); }
  Status* create_domain(const char* name, CustomOpDomain** out) const {
    return slot<Status*(const char*, CustomOpDomain**)>(26)(name, out);
  }
  Status* domain_add(CustomOpDomain* domain, const CustomOp* op) const {
    return slot<Status*(CustomOpDomain*, const CustomOp*)>(27)(domain, op);
  }
  Status* add_domain(SessionOptions* options, CustomOpDomain* domain) const {
    return slot<Status*(SessionOptions*, CustomOpDomain*)>(28)(options, domain);
  }
  Status* tensor_data(Value* value, void** out) const { return slot<Status*(Value*, void**)>(51)(value, out); }
  Status* attribute(const KernelInfo* info, const char* name, float* out) const {
    return slot<Status*(const KernelInfo*, const char*, float*)>(85)(info, name, out);
  }
  Status* attribute(const KernelInfo* info, const char* name, int64_t* out) const {
    return slot<Status*(const KernelInfo*, const char*, int64_t*)>(86)(info, name, out);
  }
  Status* input(const KernelContext* context, size_t index, const Value** out) const {
    return slot<Status*(const KernelContext*, size_t, const Value**)>(90)(context, index, out);
  }
  Status* output(KernelContext* context, size_t index, const int64_t* shape, size_t rank, Value** out) const {
    return slot<Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)>(91)(context, index, shape, rank, out);
  }
  void release_status(Status* status) const { slot<void(Status*)>(93)(status); }
  // Runs fn(user, i) for i in [0, total) on the session's pool, in `batches` units of scheduling.
  Status* parallel_for(const KernelContext* context, void (*fn)(void*, size_t), size_t total, size_t batches,
                       void* user) const {
    return slot<Status*(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(274)(
        context, fn, total, batches, user);
  }
  // The shape is the tensor's own.
  Status* type_and_shape(const Value* value, ElementType* type, const int64_t** shape, size_t* rank) const {
    return slot<Status*(const Value*, ElementType*, const int64_t**, size_t*)>(414)(value, type, shape, rank);
  }

 private:
  template <class Signature>
  Signature* slot(int index) const { return reinterpret_cast<Signature*>(const_cast<void*>(table_[index])); }

  const void* const* table_;
};

// OrtCustomOp at version 18: every pointer the runtime reads for that version, in order.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const void* api, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  ElementType (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  ElementType (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void* kernel, KernelContext*);
  void (*KernelDestroy)(void* kernel);
  Characteristic (*GetInputCharacteristic)(const CustomOp*, size_t);
  Characteristic (*GetOutputCharacteristic)(const CustomOp*, size_t);
  int (*GetInputMemoryType)(const CustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const void* api, const KernelInfo*, void** kernel);
  Status* (*KernelComputeV2)(void* kernel, KernelContext*);
  Status* (*InferOutputShape)(const CustomOp*, ShapeInferContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
  size_t (*GetMayInplace)(int** input, int** output);
  void (*ReleaseMayInplace)(int* input, int* output);
  size_t (*GetAliasMap)(int** input, int** output);
  void (*ReleaseAliasMap)(int* input, int* output);
};

}  // namespace slipstream::ort
