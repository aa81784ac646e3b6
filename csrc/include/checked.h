// Tensors as pointers: contiguous, of the dtype and the number of elements that is expected.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace flowrl {

using torch::headeronly::ScalarType;

template <typename T>
struct ScalarTypeOf;
template <>
struct ScalarTypeOf<float> {
  static constexpr ScalarType value = ScalarType::Float;
};
template <>
struct ScalarTypeOf<uint16_t> {  // the bits
  static constexpr ScalarType value = ScalarType::BFloat16;
};
template <>
struct ScalarTypeOf<int64_t> {
  static constexpr ScalarType value = ScalarType::Long;
};
template <>
struct ScalarTypeOf<bool> {
  static constexpr ScalarType value = ScalarType::Bool;
};

template <typename T>
T* checked(const torch::stable::Tensor& tensor, int64_t elements, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarTypeOf<T>::value && tensor.is_contiguous() &&
                      tensor.numel() == elements,
                  name, " must be contiguous, of the operator's dtype and have ", elements,
                  " elements, got ", tensor.numel(), "; call flowrl_kernels' public operators");
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace flowrl
