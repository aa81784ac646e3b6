// Tensors as pointers: of the dtype and the number of elements that is expected, and contiguous,
// or rows that are.
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
struct ScalarTypeOf<double> {
  static constexpr ScalarType value = ScalarType::Double;
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

// Rows of float, each without gaps; from one to the next are `stride` elements.
struct RowsOf {
  float* data;
  int64_t stride;

  float* operator[](int64_t row) const { return data + row * stride; }
};

inline RowsOf checked_rows(const torch::stable::Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.dim() == 2 &&
                      (tensor.stride(1) == 1 || tensor.size(1) <= 1),
                  name, " must be float32 rows without gaps; call flowrl_kernels' public operators");
  return {static_cast<float*>(tensor.mutable_data_ptr()), tensor.stride(0)};
}

}  // namespace flowrl
