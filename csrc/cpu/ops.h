// The CPU ops in plain C++ types; register.cpp and register_pairs.cpp call them.
#pragma once
#include "gradients.h"
#include "labels.h"
#include "policies.h"

namespace dml::cpu {

// Values [first, first + n) of a vector as A.
template <class A>
void read_values(const Vector& v, std::int64_t first, std::int64_t n, A* out) {
  const auto* data = static_cast<const char*>(v.data) + first * v.stride * bytes_of(v.dtype);
  read_row(Matrix{data, v.dtype, 1, n, 0, v.stride}, 0, out);
}

// All n values of a vector; where it was not given, n times `otherwise`.
template <class A>
std::vector<A> read_rows(const Vector& v, std::int64_t n, A otherwise) {
  std::vector<A> out(n, otherwise);
  if (v) read_values(v, 0, n, out.data());
  return out;
}

// A vector that the library itself holds; an empty one counts as not given.
template <class A>
Vector vector_of(const std::vector<A>& v) {
  return {v.empty() ? nullptr : v.data(), dtype_for<A>, 1};
}

// A logit with a policy between score and logit.
struct PolicyLogitArgs : LogitArgs {
  Policy policy = {};
};

template <class P>
void masked_logsumexp_fwd(const Comparison<P>&, const Labels&, const PolicyLogitArgs&, const LseOut&);
template <class P>
void masked_logsumexp_bwd(const Comparison<P>&, const Labels&, const PolicyLogitArgs&, const LseGrads&,
                          const LseTargets&);

// The Proxy-NCA loss of rows x with proxies w; dml_kernels/losses/proxy_nca.py has the formula.
struct ProxyArgs {
  Matrix x, w;
  const std::int64_t* y;
  std::int64_t ignore, first_class;  // proxy j is that of class first_class + j
  Vector scale, weight;              // null stands for 1; the weights are those of the rows
  double factor, label_smoothing, eps;
  bool exclude_positive;
  Reduction reduction;
};

struct ProxyOut {
  void *value, *same, *different;  // of the accumulation type: (n,) or (), (n,), (n,)
};

struct ProxyTargets {
  Target x, w, scale;  // scale: (n,), one value for each row, even where the scale is one number
};

template <class P>
void proxy_nca_fwd(const ProxyArgs&, const ProxyOut&);
// grad is that of the value, with stride 0 where the value is a scalar; same and different are results of the forward.
template <class P>
void proxy_nca_bwd(const ProxyArgs&, const Vector& grad, const Vector& same, const Vector& different,
                   const ProxyTargets&);

template <class P>
void magnet_fwd(const MagnetArgs&, const MagnetOut&);
// grad is that of the value, with stride 0 where the value is a scalar; different is a result of the forward.
template <class P>
void magnet_bwd(const MagnetArgs&, const Vector& grad, const Vector& different, const MagnetTargets&);

// A term of masked_hinge_sum is relu(k s + offset), with an offset for each row; see
// dml_kernels/ops/masked_hinge_sum.py.
struct HingeArgs {
  double k_same, k_different;
  Vector offset_same, offset_different;
};

struct HingeOut {
  void *same, *different;                      // (n,) of the accumulation type
  std::int64_t *count_same, *count_different;  // (n,)
};

// For each row, the gradient in the score of a positive term of each set. label_column is the gradient at the column
// that the row's label names; null where it is not used.
struct HingeSlopes {
  Vector same, different, label_column;
};

template <class P>
void masked_hinge_sum_fwd(const Comparison<P>&, const Labels&, const HingeArgs&, const HingeOut&);
template <class P>
void masked_hinge_sum_bwd(const Comparison<P>&, const Labels&, const HingeArgs&, const HingeSlopes&, Target grad_x,
                          Target grad_w);

// The arguments of masked_argmax; see dml_kernels/ops/masked_argmax.py.
struct ArgmaxArgs {
  Vector low, high;      // open bounds of each row's scores, null where not given
  bool same, different;  // which sets are wanted
  bool largest_same, largest_different;
  bool noise;
  std::uint64_t seed;
  double cutoff, nonzero_loss_cutoff;
};

// The results of a set, (n,); null where the set is not wanted. score has the accumulation type.
struct ArgmaxOut {
  std::int64_t* index;
  void* score;
  std::int64_t* count;
};

template <class P>
void masked_argmax(const Comparison<P>&, const Labels&, const ArgmaxArgs&, const ArgmaxOut& same,
                   const ArgmaxOut& different);

// out (n, m) contiguous, of the product type: a similarity, or a distance.
template <class P>
void distance_fwd(const Comparison<P>&, Target out);
template <class P>
void distance_bwd(const Comparison<P>&, const Matrix& grad, Target grad_x, Target grad_w);

void normalize_fwd(const Matrix& x, double eps, Target out);
void normalize_bwd(const Matrix& grad, const Matrix& x, double eps, Target out);

}  // namespace dml::cpu
