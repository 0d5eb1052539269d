// The vector loops of the logit policies (policies.h); a part of row_kernels_impl.h. In s the `centres` scores of a
// class are next to each other; the loops run over the classes.

template <class A>
void max_pool(const A* __restrict__ s, std::int64_t centres, A* __restrict__ pooled, std::int32_t* __restrict__ winner,
              std::int64_t n) {
  for (std::int64_t c = 0; c < n; ++c) pooled[c] = s[c * centres], winner[c] = 0;
  for (std::int64_t k = 1; k < centres; ++k)
    for (std::int64_t c = 0; c < n; ++c) {
      const A v = s[c * centres + k];
      const bool larger = v > pooled[c] || v != v;  // NaN stays
      pooled[c] = larger ? v : pooled[c];
      winner[c] = larger ? std::int32_t(k) : winner[c];
    }
}

// Relative to the class's maximum, so that neither the exponentials nor the sum lose digits.
template <class A>
void softmax_pool(const A* __restrict__ s, std::int64_t centres, A gamma, A* __restrict__ work, A* __restrict__ pooled,
                  A* __restrict__ slope, std::int64_t n) {
  A* __restrict__ below = work, * __restrict__ e = work + n * centres;  // centre by centre
  A* __restrict__ total = e + n * centres, * __restrict__ mean = total + n;
  for (std::int64_t c = 0; c < n; ++c) pooled[c] = s[c * centres], total[c] = mean[c] = 0;
  for (std::int64_t k = 0; k < centres; ++k)
    for (std::int64_t c = 0; c < n; ++c) {
      const A v = s[c * centres + k];
      below[k * n + c] = v;
      pooled[c] = v > pooled[c] ? v : pooled[c];
    }
  for (std::int64_t k = 0; k < centres; ++k)
    for (std::int64_t c = 0; c < n; ++c) {
      const A v = below[k * n + c] - pooled[c], weight = exp_of<A>(v / gamma);
      below[k * n + c] = v, e[k * n + c] = weight;
      total[c] += weight, mean[c] += weight * v;
    }
  for (std::int64_t c = 0; c < n; ++c) mean[c] /= total[c], pooled[c] += mean[c];
  if (!slope) return;
  for (std::int64_t k = 0; k < centres; ++k)
    for (std::int64_t c = 0; c < n; ++c)
      slope[c * centres + k] = e[k * n + c] / total[c] * (1 + (below[k * n + c] - mean[c]) / gamma);
}

template <class A>
void spread(const A* __restrict__ ds, std::int64_t centres, A* __restrict__ slope, std::int64_t n) {
  for (std::int64_t c = 0; c < n; ++c)
    for (std::int64_t k = 0; k < centres; ++k) slope[c * centres + k] *= ds[c];
}

template <class A>
void circle(const A* __restrict__ s, const Row<A>& row, const A* __restrict__ b, A m, A* __restrict__ alpha,
            A* __restrict__ z, std::int64_t n) {
  const A kt = row.kt, o = row.o;
  for (std::int64_t j = 0; j < n; ++j) {
    const A weight = s[j] + m > A(0) ? s[j] + m : A(0);
    alpha[j] = weight;
    z[j] = kt * weight * (s[j] - o) + (b ? b[j] : A(0));
  }
}

template <class A>
void multiply_by(A* __restrict__ v, const A* __restrict__ f, std::int64_t n) {
  for (std::int64_t j = 0; j < n; ++j) v[j] *= f[j];
}
