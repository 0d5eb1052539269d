// What the ops of the CPU need in addition to tensors.h: the product type, and the rows and bank that are compared.
#pragma once
#include "cpu/ops.h"
#include "tensors.h"

namespace dml::cpu {

struct Cpu {
  static constexpr const char* name = "the CPU";
  static constexpr bool excludes_pairs = true;  // a row may exclude two columns: (n, 2)
  static bool holds(const Tensor& t) { return t.is_cpu(); }
};

using Checked = CheckedOn<Cpu>;

// Rows x against the bank w, in product type P.
template <class P>
Comparison<P> comparison_of(const Tensor& x, const Tensor& w, std::int64_t metric, bool normalize, double eps, Cut cut,
                            std::int64_t centres = 1) {
  const Matrix rows = Checked::matrix(x, "x"), bank = Checked::matrix(w, "w");
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

// What sums are kept in. The dtype of `kind`, an empty tensor, is that of the products.
inline ScalarType accumulation(const Tensor& kind) {
  return dml::accumulation(kind.scalar_type() == ScalarType::Double);
}

}  // namespace dml::cpu
