// x / max(|x|, eps) and its gradient: a warp a row, which is read twice, the second time from the cache.
#include "platform.cuh"

namespace dml::cuda {
namespace {

constexpr int rows_per_block = block_threads / warp_lanes;

template <class A, bool backward>
__global__ void __launch_bounds__(block_threads, 6)
    normalize_kernel(const Matrix x, const Matrix grad, const A eps, const Target out) {
  const std::int64_t row = std::int64_t(blockIdx.x) * rows_per_block + threadIdx.x / warp_lanes, d = x.cols;
  if (row >= x.rows) return;
  const int lane = threadIdx.x % warp_lanes;
  A square = 0, product = 0;
  for (std::int64_t k = lane * 4; k < d; k += warp_lanes * 4) {
    const Quad<A> values = load_quad<A>(x, row, k);
    const Quad<A> g = backward ? load_quad<A>(grad, row, k) : values;
    DML_UNROLL
    for (int i = 0; i < 4; ++i) square += values.v[i] * values.v[i], product += values.v[i] * g.v[i];
  }
  bool unit;
  const A r = inverse_norm(warp_sum(square), eps, unit);
  // x^.g; where the row is shorter than eps its norm is a constant.
  const A along = backward && unit ? warp_sum(product) * r : A(0);
  for (std::int64_t k = lane; k < d; k += warp_lanes) {
    const A value = load<A>(x, row, k) * r;
    const A result = backward ? r * (load<A>(grad, row, k) - along * value) : value;
    store(out.data, out.dtype, row * d + k, result);
  }
}

template <bool backward>
Failure launch(const Matrix& x, const Matrix& grad, double eps, Target out, Stream stream) {
  if (x.rows == 0) return nullptr;
  const std::int64_t blocks = (x.rows + rows_per_block - 1) / rows_per_block;
  if (blocks > 0x7fffffff) return "normalize takes at most 8 billion rows";
  return with_accumulation(x.dtype == Dtype::f64, [&](auto zero) {
    using A = decltype(zero);
    const auto kernel = normalize_kernel<A, backward>;
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
