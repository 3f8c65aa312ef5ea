// Element types of tensors, by ONNX's numbers.
#pragma once

#include <cstdint>

namespace slipstream {

enum class ElementType : int32_t {
  undefined = 0, float32 = 1, uint8 = 2, int8 = 3, int32 = 6, int64 = 7, float16 = 10, float8e4m3fn = 17,
};

}  // namespace slipstream
