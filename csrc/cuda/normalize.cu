// x / max(|x|, eps) and its gradient. A warp takes a row and reads it twice, the second time from the cache.
#include "platform.cuh"

namespace dml::cuda {
namespace {

constexpr int rows_per_block = block_threads / warp_lanes;

// `count` values of a row at a time, in aligned loads and stores: 8 halves, 4 of any dtype, or 1.
template <class A, bool backward, int count>
__global__ void __launch_bounds__(block_threads, 6)
    normalize_kernel(const Matrix x, const Matrix grad, const A eps, const Target out) {
  const std::int64_t row = std::int64_t(blockIdx.x) * rows_per_block + threadIdx.x / warp_lanes, d = x.cols;
  if (row >= x.rows) return;
  const std::int64_t first = threadIdx.x % warp_lanes * count, step = warp_lanes * count;
  const auto load_from = [row](const Matrix& m, std::int64_t k) -> Run<A, count> {
    if constexpr (count == 1 && std::is_same_v<A, double>)  // both are fp64 here; choosing a dtype would take registers
      return {static_cast<const double*>(m.data)[row * m.row_stride + k * m.col_stride]};
    else if constexpr (count == 1)
      return {load<A>(m, row, k)};
    else
      return load_aligned<A, count>(m, row, k);
  };
  A square = 0, product = 0;
  DML_UNROLL_BY(2)
  for (std::int64_t k = first; k < d; k += step) {
    const Run<A, count> values = load_from(x, k), g = backward ? load_from(grad, k) : values;
    DML_UNROLL
    for (int i = 0; i < count; ++i) square += values.v[i] * values.v[i], product += values.v[i] * g.v[i];
  }
  bool unit;
  const A r = inverse_norm(warp_sum(square), eps, unit);
  // u.g; 0 where the row is shorter than eps, because the norm is a constant there.
  const A along = backward && unit ? warp_sum(product) * r : A(0);
  DML_UNROLL_BY(2)
  for (std::int64_t k = first; k < d; k += step) {
    Run<A, count> values = load_from(x, k);
    const Run<A, count> g = backward ? load_from(grad, k) : values;
    DML_UNROLL
    for (int i = 0; i < count; ++i) {
      values.v[i] *= r;
      if (backward) values.v[i] = r * (g.v[i] - along * values.v[i]);
    }
    store_run(out, row * d + k, values);
  }
}

template <bool backward>
Failure launch(const Matrix& x, const Matrix& grad, double eps, Target out, Stream stream) {
  if (x.rows == 0) return nullptr;
  const std::int64_t blocks = (x.rows + rows_per_block - 1) / rows_per_block;
  if (blocks > 0x7fffffff) return "normalize takes at most 8 billion rows";
  const auto fits = [&](int count) {
    return x.load_width >= count && grad.load_width >= count && x.cols % count == 0 &&
           reinterpret_cast<std::uintptr_t>(out.data) % 16 == 0;
  };
  return with_accumulation(x.dtype == Dtype::f64, [&](auto zero) {
    using A = decltype(zero);
    constexpr int most = std::is_same_v<A, float> ? 8 : 4;
    const auto kernel = fits(most) ? normalize_kernel<A, backward, most>
                        : fits(4)  ? normalize_kernel<A, backward, 4>
                                   : normalize_kernel<A, backward, 1>;
    DML_LAUNCH(kernel, unsigned(blocks), block_threads, 0, static_cast<cudaStream_t>(stream), x, grad, A(eps), out);
    return launch_failure();
  });
}

}  // namespace

Failure normalize_forward(const Matrix& x, double eps, Target out, Stream stream) {
  return launch<false>(x, x, eps, out, stream);
}

Failure normalize_backward(const Matrix& grad, const Matrix& x, double eps, Target out, Stream stream) {
  return launch<true>(x, grad, eps, out, stream);
}

}  // namespace dml::cuda
