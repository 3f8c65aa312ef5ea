// What the generated signatures read: a node's attributes when a graph is loaded, and the tensors of a call.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <iterator>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "cpu/ort_abi.h"

namespace slipstream::ort {

struct TensorDeclaration {
  ElementType type;
  Characteristic characteristic;
};

template <class... Signature>
struct List {};

// A failed call of the runtime, kept until it can be handed back to it.
struct Failure {
  Status* status;
};

inline void expect_ok(Status* status) {
  if (status != nullptr) throw Failure{status};
}

// The sizes of a spec's shapes. Attributes come from a file, and an axis of an empty tensor may be of any length.
[[noreturn]] inline void overflow() {
  throw std::invalid_argument("attributes and shapes make a size that 64 bits do not hold");
}

inline int64_t add(int64_t a, int64_t b) {
  int64_t sum = 0;
  if (__builtin_add_overflow(a, b, &sum)) overflow();
  return sum;
}

inline int64_t subtract(int64_t a, int64_t b) {
  int64_t difference = 0;
  if (__builtin_sub_overflow(a, b, &difference)) overflow();
  return difference;
}

inline int64_t multiply(int64_t a, int64_t b) {
  int64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product)) overflow();
  return product;
}

inline int64_t divide(int64_t a, int64_t b) {
  if (b == 0) throw std::invalid_argument("the attributes divide a size by zero");
  return b == -1 ? subtract(0, a) : a / b;
}

// A node whose attributes are read, each in the type that its spec declares or not at all.
class Node {
 public:
  Node(const Api& api, const KernelInfo* info) : api_(api), info_(info) {}

  int64_t int_attribute(const char* name, int64_t low, int64_t high) const {
    return within(name, low, high, find_int(name, nullptr));
  }
  int64_t int_attribute(const char* name, int64_t low, int64_t high, int64_t otherwise) const {
    return within(name, low, high, find_int(name, &otherwise));
  }
  float float_attribute(const char* name) const { return find_float(name, nullptr); }
  float float_attribute(const char* name, float otherwise) const { return find_float(name, &otherwise); }

 private:
  static int64_t within(const char* name, int64_t low, int64_t high, int64_t value) {
    if (value < low || value > high)
      throw std::invalid_argument(std::string("attribute ") + name + " is " + std::to_string(value) + ", not " +
                                  std::to_string(low) + " to " + std::to_string(high));
    return value;
  }

  int64_t find_int(const char* name, const int64_t* otherwise) const {
    int64_t value = 0;
    if (get(name, &value)) return value;
    expect_absent(name, "int", otherwise != nullptr);
    return *otherwise;
  }

  // An integer is a float too: writers of graphs spell 1.0 as 1.
  float find_float(const char* name, const float* otherwise) const {
    float value = 0;
    if (get(name, &value)) return value;
    int64_t whole = 0;
    if (get(name, &whole)) return static_cast<float>(whole);
    expect_absent(name, "float", otherwise != nullptr);
    return *otherwise;
  }

  template <class T>
  bool get(const char* name, T* value) const {
    Status* status = api_.attribute(info_, name, value);
    if (status != nullptr) api_.release_status(status);
    return status == nullptr;
  }

  // The runtime fails alike for an attribute that is missing and for one of another type; only its words differ. Those
  // for a name that no node has say which it is.
  void expect_absent(const char* name, const char* type, bool optional) const {
    if (complaint(name) != complaint("slipstream_absent"))
      throw std::invalid_argument(std::string("attribute ") + name + " is not of type " + type);
    if (!optional) throw std::invalid_argument(std::string("attribute ") + name + " is missing");
  }

  // What the runtime says when it does not find an attribute, without the name.
  std::string complaint(const std::string& name) const {
    int64_t value = 0;
    Status* status = api_.attribute(info_, name.c_str(), &value);
    if (status == nullptr) return "";
    std::string text = api_.message(status);
    api_.release_status(status);
    const size_t at = text.find("'" + name + "'");
    return at == std::string::npos ? text : text.replace(at, name.size() + 2, "");
  }

  const Api& api_;
  const KernelInfo* info_;
};

struct Tensor {
  void* data = nullptr;
  ElementType type = ElementType::undefined;
  bool present = false;
  size_t rank = 0;
  int64_t shape[8] = {};

  template <class T>
  T* as() const { return static_cast<T*>(data); }

  int64_t elements() const {
    int64_t n = present ? 1 : 0;
    for (size_t i = 0; i < rank; ++i)
      if (shape[i] == 0) return 0;  // the others may be of any length
    for (size_t i = 0; i < rank; ++i) n = multiply(n, shape[i]);
    return n;
  }
};

// Inputs and outputs of one call. Whatever does not fit the spec is thrown as std::invalid_argument.
class Call {
 public:
  Call(const Api& api, KernelContext* context) : api_(api), context_(context) {}

  // A rank of 0 is any.
  Tensor required(size_t index, const char* name, size_t rank) const {
    const Tensor tensor = optional(index, name, rank);
    if (!tensor.present) fail(std::string("input ") + name + " is missing");
    return tensor;
  }

  Tensor optional(size_t index, const char* name, size_t rank) const {
    const Value* value = nullptr;
    expect_ok(api_.input(context_, index, &value));
    if (value == nullptr) return Tensor{};
    const Tensor tensor = describe(const_cast<Value*>(value));
    if (rank != 0 && tensor.rank != rank)
      fail(std::string("input ") + name + " has rank " + std::to_string(tensor.rank) + ", expected " +
           std::to_string(rank));
    return tensor;
  }

  void expect_type(const Tensor& tensor, const char* name, std::initializer_list<ElementType> types,
                   const char* said) const {
    for (const ElementType type : types)
      if (tensor.type == type) return;
    if (tensor.present) fail(std::string(name) + " must be " + said);
  }

  void expect_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape,
                    const char* said) const {
    if (!tensor.present) return;
    size_t axis = 0;
    for (const int64_t size : shape) {
      if (tensor.shape[axis] != size)
        fail(std::string(name) + " does not have the shape " + said + ": axis " + std::to_string(axis) + " is " +
             std::to_string(tensor.shape[axis]) + ", expected " + std::to_string(size));
      ++axis;
    }
  }

  // Sets `any` when the output has elements.
  template <class T>
  T* output(size_t index, std::initializer_list<int64_t> shape, bool& any) const {
    for (const int64_t size : shape)
      if (size < 0) fail("the attributes and inputs make an output of a negative size");
    Value* value = nullptr;
    expect_ok(api_.output(context_, index, shape.begin(), shape.size(), &value));
    void* data = nullptr;
    expect_ok(api_.tensor_data(value, &data));
    bool empty = false;
    for (const int64_t size : shape) empty |= size == 0;
    any |= !empty;
    return static_cast<T*>(data);
  }

 private:
  [[noreturn]] static void fail(const std::string& what) { throw std::invalid_argument(what); }

  Tensor describe(Value* value) const {
    Tensor tensor;
    tensor.present = true;
    const int64_t* shape = nullptr;
    expect_ok(api_.type_and_shape(value, &tensor.type, &shape, &tensor.rank));
    if (tensor.rank > std::size(tensor.shape)) fail("a tensor has more than 8 axes");
    std::copy_n(shape, tensor.rank, tensor.shape);
    expect_ok(api_.tensor_data(value, &tensor.data));
    return tensor;
  }

  const Api& api_;
  KernelContext* context_;
};

}  // namespace slipstream::ort
