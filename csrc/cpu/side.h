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

// Reads row i as A; writes n values, from `offset` on.
template <class A>
void read_row(const Matrix& source, std::int64_t i, A* out);
template <class A>
void write_values(const A* values, void* out, Dtype dtype, std::int64_t offset, std::int64_t n);

template <class P>
class Side {
 public:
  using A = Acc<P>;

  Mat<const P> operand;    // (rows, D) in the product type: the source itself, or a kept copy; null if block() copies
  std::vector<A> r, sq;    // 1 / max(norm, eps) or 1; the squared norm after scaling by r
  std::vector<char> unit;  // whether the row is divided by its norm, so that its gradient is projected
  bool all_unit = false;

  // Loads rows [first, first + count) of the source. A source of another type or layout is copied here with `keep`, and
  // by block() without.
  void load(const Matrix& source, std::int64_t first, std::int64_t count, bool normalize, double eps, bool keep);

  // Rows [begin, begin + n) for products, in place or copied into `buffer`.
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

  // Turns grad into the gradient of the source row. That of a unit vector is projected. For other rows it subtracts the
  // part of squared distances that lies along the row, 2 r^2 times the row, times the sum of dS.
  void finish(std::int64_t i, A* grad, A ds_sum, A* buffer) const {
    const auto& kernels = row_kernels<A>();
    const std::int64_t d = source_.cols;
    if (!unit[i] && ds_sum == A(0)) return;
    // The scaled row, because r squared could overflow.
    kernels.scale_each(full(i, buffer), r[i], nullptr, buffer, d);
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
