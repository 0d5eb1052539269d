// Rows of x, or one tile of the bank, ready for products and scores.
#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../core/arguments.h"
#include "products.h"
#include "row_kernels.h"

namespace dml::cpu {

template <class P>
using Acc = std::conditional_t<std::is_same_v<P, double>, double, float>;

template <class P>
constexpr Dtype dtype_for = std::is_same_v<P, double>  ? Dtype::f64
                            : std::is_same_v<P, float> ? Dtype::f32
                                                       : Dtype::bf16;

// Reads n values with a stride as A, or writes n values.
template <class A>
void read_row(const Matrix& source, std::int64_t i, A* out);
template <class A>
void write_values(const A* values, void* out, Dtype dtype, std::int64_t offset, std::int64_t n);

template <class P>
class Side {
 public:
  using A = Acc<P>;

  Mat<const P> operand;    // (rows, D) in the product type: the source itself where that serves, or a copy, if kept
  std::vector<A> r, sq;    // 1 / max(|t|, eps) or 1; squared norm after scaling by r
  std::vector<char> unit;  // divided by its own norm, so that the projection applies
  bool all_unit = false;

  // Rows [first, first + count) of the source. Unless `keep`, products of another type or layout are made by block().
  void load(const Matrix& source, std::int64_t first, std::int64_t count, bool normalize, double eps, bool keep);

  // Rows [begin, begin + n) for products: in place, or in `buffer`.
  Mat<const P> block(std::int64_t begin, std::int64_t n, std::vector<P>& buffer) const {
    if (operand.data) return operand.row_block(begin, n);
    buffer.resize(n * source_.cols);
    convert(begin, n, buffer.data());
    return {buffer.data(), n, source_.cols, source_.cols};
  }

  // The row as it came, in the accumulation type; `buffer` holds D values, used where a conversion is needed.
  const A* full(std::int64_t i, A* buffer) const {
    if (std::is_same_v<P, A> && operand.data) return reinterpret_cast<const A*>(operand.row(i));
    read_row(source_, first_ + i, buffer);
    return buffer;
  }

  // grad -> the gradient in the source row: takes off the row's own part of squared distances (`own`, the sum of dS)
  // where that row is no unit vector, and projects where it is.
  void finish(std::int64_t i, A* grad, A ds_sum, A* buffer) const {
    const auto& kernels = row_kernels<A>();
    const std::int64_t d = source_.cols;
    if (!unit[i] && ds_sum == A(0)) return;
    kernels.scale_each(full(i, buffer), r[i], nullptr, buffer,
                       d);  // the scaled row: r by itself squared could overflow
    kernels.axpy(grad, unit[i] ? -kernels.dot(buffer, grad, d) : -2 * ds_sum * r[i], buffer, d);
  }

 private:
  void convert(std::int64_t begin, std::int64_t n, P* out) const;

  Matrix source_{};
  std::int64_t first_ = 0;
  std::vector<P> copy_;
  std::vector<A> row_;
};

}  // namespace dml::cpu
