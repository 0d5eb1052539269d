// Proxy-NCA of one row from its two log-sum-exps; see dml_kernels/losses/proxy_nca.py for the formula.
#pragma once
#include "platform.cuh"

namespace dml::cuda {

// -L+ + log(e^L+ + e^L-), or -L+ + L- with the positive left out (0 for a row without negatives).
template <class A>
__device__ A proxy_nca_row(const ProxyNca& loss, A same, A different) {
  if (loss.exclude_positive) return different == A(-INFINITY) ? A(0) : different - same;
  const A gap = different - same;  // log(1 + e^gap)
  return gap > A(0) ? gap + log1p(exp(-gap)) : log1p(exp(gap));
}

// The derivative by L-; the derivative by L+ is its negative.
template <class A>
__device__ A proxy_nca_slope(const ProxyNca& loss, A same, A different) {
  if (loss.exclude_positive) return different == A(-INFINITY) ? A(0) : A(1);
  const A gap = different - same;
  return gap > A(0) ? A(1) / (A(1) + exp(-gap)) : exp(gap) / (A(1) + exp(gap));
}

// What the weights of rows are divided by: for a mean, the total weight of the rows that count. All threads of the
// block call it.
template <class A>
__device__ A proxy_nca_divisor(const ProxyNca& loss, const Labels& labels, std::int64_t n, double* parts) {
  if (loss.reduction != Reduction::mean) return 1;
  double mass = 0;
  for (std::int64_t i = threadIdx.x; i < n; i += block_threads)
    if (labels.y[i] != labels.ignore) mass += load<A>(loss.weight, i, A(1));
  mass = block_sum(mass, parts);
  return mass == 0 ? A(1) : A(mass);
}

}  // namespace dml::cuda
