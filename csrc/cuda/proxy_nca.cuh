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

// Its derivative by L-; by L+ it is the negative of that.
template <class A>
__device__ A proxy_nca_slope(const ProxyNca& loss, A same, A different) {
  if (loss.exclude_positive) return different == A(-INFINITY) ? A(0) : A(1);
  const A gap = different - same;
  return gap > A(0) ? A(1) / (A(1) + exp(-gap)) : exp(gap) / (A(1) + exp(gap));
}

}  // namespace dml::cuda
