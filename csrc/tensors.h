// From stable-ABI tensors to the plain types of the CPU ops; arguments arrive checked by Python, and are guarded here
// again where memory depends on it.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

#include "arguments.h"
#include "cpu/ops.h"

namespace dml::cpu {

using dml::choice;
using dml::has_shape;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The tensor's dtype, which the kernels must be able to read and write.
inline ScalarType floating(const Tensor& t, const char* name) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  "dml_kernels: ", name, " must be float32, float64, bfloat16 or float16");
  return dtype;
}

inline Source matrix(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.is_cpu(), "dml_kernels: ", name, " must be a matrix on the CPU");
  return {t.const_data_ptr(), floating(t, name), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

// (n,), or () for one value that serves all.
inline Vector vector(const Tensor& t, std::int64_t n, const char* name) {
  const bool scalar = t.dim() == 0;
  STD_TORCH_CHECK((scalar || (t.dim() == 1 && t.size(0) == n)) && t.is_cpu(), "dml_kernels: ", name, " must have ", n,
                  " elements");
  return {t.const_data_ptr(), floating(t, name), scalar ? 0 : t.stride(0)};
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

inline Labels labels(std::int64_t n, std::int64_t m, const Tensor& y, const OptionalTensor& c,
                     const OptionalTensor& exclude, std::int64_t ignore_index) {
  return {integers(y, n, "y"), integers(c, m, "c"), integers(exclude, n, "exclude"), ignore_index};
}

// Contiguous and of this shape; or empty where no gradient is wanted.
inline Target target(const Tensor& t, std::initializer_list<std::int64_t> shape, const char* name) {
  if (t.numel() == 0) return {nullptr, ScalarType::Float};
  STD_TORCH_CHECK(has_shape(t, shape) && t.is_contiguous() && t.is_cpu(), "dml_kernels: ", name,
                  " has the wrong shape");
  return {t.mutable_data_ptr(), floating(t, name)};
}

// A gradient's target, like the tensor that it belongs to.
inline Target target_like(const Tensor& t, const Tensor& like, const char* name) {
  return target(t, {like.size(0), like.size(1)}, name);
}

// Rows x against the bank w, in product type P.
template <class P>
Comparison<P> comparison_of(const Tensor& x, const Tensor& w, std::int64_t metric, bool normalize, double eps, Cut cut,
                            std::int64_t centres = 1) {
  const Source rows = matrix(x, "x"), bank = matrix(w, "w");
  STD_TORCH_CHECK(rows.cols == bank.cols && rows.cols > 0, "dml_kernels: x and w must have the same embedding size");
  STD_TORCH_CHECK(bank.rows > 0, "dml_kernels: w has no rows");
  return {rows, bank, choice<Metric>(metric, 3, "metric"), normalize, eps, cut, centres};
}

template <class Function>
void with_product_type(ScalarType dtype, Function function) {
  if (dtype == ScalarType::Float || dtype == ScalarType::Half) return function(float{});  // fp16 tiles are widened
  if (dtype == ScalarType::Double) return function(double{});
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16, "dml_kernels: products are float32, float64, bfloat16 or float16");
  function(bf16{});
}

// What sums are kept in, by the products' dtype, which the empty tensor `kind` carries.
inline ScalarType accumulation(const Tensor& kind) {
  return kind.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace dml::cpu
