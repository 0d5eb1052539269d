// From stable-ABI tensors to the plain types of the CPU ops; arguments arrive checked by Python, and are guarded here
// again where memory depends on it.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "cpu/ops.h"

namespace dml::cpu {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Source matrix(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.is_cpu(), "dml_kernels: ", name, " must be a matrix on the CPU");
  return {t.const_data_ptr(), t.scalar_type(), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

inline Vector vector(const Tensor& t, std::int64_t n, const char* name) {
  if (t.dim() == 0) return {t.const_data_ptr(), t.scalar_type(), 0};
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == n && t.is_cpu(), "dml_kernels: ", name, " must have ", n, " elements");
  return {t.const_data_ptr(), t.scalar_type(), t.stride(0)};
}

inline Vector vector(const OptionalTensor& t, std::int64_t n, const char* name) {
  return t ? vector(*t, n, name) : Vector{};
}

inline const std::int64_t* integers(const Tensor& t, std::int64_t n, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == n && t.is_contiguous() && t.scalar_type() == ScalarType::Long,
                  "dml_kernels: ", name, " must be ", n, " contiguous int64");
  return t.const_data_ptr<std::int64_t>();
}

inline const std::int64_t* integers(const OptionalTensor& t, std::int64_t n, const char* name) {
  return t ? integers(*t, n, name) : nullptr;
}

inline Labels labels(const Tensor& x, const Tensor& w, const Tensor& y, const OptionalTensor& c,
                     const OptionalTensor& exclude, std::int64_t ignore_index) {
  const std::int64_t n = x.size(0), m = w.size(0);
  return {integers(y, n, "y"), integers(c, m, "c"), integers(exclude, n, "exclude"), ignore_index};
}

// Contiguous, of the same shape as `like`; or empty where no gradient is wanted.
inline Target target(const Tensor& t, std::int64_t size, const char* name) {
  if (t.numel() == 0) return {nullptr, t.scalar_type()};
  STD_TORCH_CHECK(t.numel() == size && t.is_contiguous() && t.is_cpu(), "dml_kernels: ", name, " has the wrong shape");
  return {t.mutable_data_ptr(), t.scalar_type()};
}

template <class Function>
void with_product_type(ScalarType dtype, Function function) {
  if (dtype == ScalarType::Float) return function(float{});
  if (dtype == ScalarType::Double) return function(double{});
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16, "dml_kernels: products are float32, float64 or bfloat16");
  function(bf16{});
}

// What sums are kept in, by the products' dtype, which the empty tensor `kind` carries.
inline ScalarType accumulation(const Tensor& kind) {
  return kind.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace dml::cpu
