#include "side.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace dml::cpu {
namespace {

template <class Function>
void with_type(Dtype dtype, Function function) {
  if (dtype == Dtype::f32) return function(float{});
  if (dtype == Dtype::f64) return function(double{});
  if (dtype == Dtype::bf16) return function(bf16{});
  if (dtype == Dtype::f16) return function(fp16{});
  throw std::invalid_argument("dml_kernels: the cpu backend reads float32, float64, bfloat16 and float16");
}

}  // namespace

template <class A>
void read_row(const Matrix& source, std::int64_t i, A* out) {
  with_type(source.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* in = static_cast<const T*>(source.data) + i * source.row_stride;
    if constexpr (std::is_same_v<T, bf16>) {
      if (source.col_stride == 1) return row_kernels<A>().widen(in, out, source.cols);
    } else if constexpr (std::is_same_v<T, fp16>) {
      if (source.col_stride == 1) return row_kernels<A>().widen_fp16(in, out, source.cols);
    }
    for (std::int64_t j = 0; j < source.cols; ++j) out[j] = static_cast<A>(in[j * source.col_stride]);
  });
}

template <class A>
void write_values(const A* values, void* out, Dtype dtype, std::int64_t offset, std::int64_t n) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(out) + offset;
    if constexpr (std::is_same_v<T, bf16>) {
      row_kernels<A>().scale_each_bf16(values, A(1), nullptr, to, n);
    } else if constexpr (std::is_same_v<T, fp16>) {
      row_kernels<A>().narrow_fp16(values, to, n);
    } else {
      for (std::int64_t j = 0; j < n; ++j) to[j] = static_cast<T>(values[j]);
    }
  });
}

template <class P>
void Side<P>::convert(std::int64_t begin, std::int64_t n, P* out) const {
  const std::int64_t d = source_.cols;
  if constexpr (std::is_same_v<P, bf16>) {
    std::vector<A> row(d);
    for (std::int64_t i = 0; i < n; ++i) {
      read_row(source_, first_ + begin + i, row.data());
      row_kernels<A>().scale_each_bf16(row.data(), A(1), nullptr, out + i * d, d);
    }
  } else {
    for (std::int64_t i = 0; i < n; ++i) read_row(source_, first_ + begin + i, out + i * d);
  }
}

template <class P>
void Side<P>::load(const Matrix& source, std::int64_t first, std::int64_t count, bool normalize, double eps,
                   bool keep) {
  source_ = source, first_ = first;
  const std::int64_t d = source.cols;
  const auto& kernels = row_kernels<A>();
  // BLAS can read the source in place if its strides fit into an int.
  const bool in_place = source.dtype == dtype_for<P> && source.col_stride == 1 && source.row_stride >= d &&
                        source.row_stride <= std::numeric_limits<int>::max();
  row_.resize(d);
  if (in_place) {
    operand = {static_cast<const P*>(source.data) + first * source.row_stride, count, d, source.row_stride};
  } else if (keep) {
    operand = {};
    operand = block(0, count, copy_);
  } else {
    operand = {};
  }
  r.assign(count, A(1)), sq.resize(count), unit.assign(count, 0);
  all_unit = normalize;
  for (std::int64_t i = 0; i < count; ++i) {
    const A* t = full(i, row_.data());
    const A square = kernels.dot(t, t, d);
    if (!normalize) {
      sq[i] = square;
      continue;
    }
    const A norm = std::sqrt(square);
    r[i] = A(1) / (norm < A(eps) ? A(eps) : norm);  // a NaN norm stays NaN
    unit[i] = !(norm < A(eps));
    all_unit = all_unit && unit[i];
    sq[i] = square * r[i] * r[i];
  }
}

template class Side<float>;
template class Side<double>;
template class Side<bf16>;
template void read_row<float>(const Matrix&, std::int64_t, float*);
template void read_row<double>(const Matrix&, std::int64_t, double*);
template void write_values<float>(const float*, void*, Dtype, std::int64_t, std::int64_t);
template void write_values<double>(const double*, void*, Dtype, std::int64_t, std::int64_t);

}  // namespace dml::cpu
