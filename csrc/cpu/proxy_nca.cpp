// The Proxy-NCA loss, forward and backward in one call each: the tiles of masked_logsumexp, and a pass over vectors of
// size N.
#include <cmath>
#include <limits>

#include "ops.h"

namespace dml::cpu {
namespace {

template <class P>
class ProxyNca {
 public:
  using A = Acc<P>;

  explicit ProxyNca(const ProxyArgs& args)
      : args_(args), n_(args.x.rows),
        comparison_(args.x, args.w, Metric::sqeuclidean, true, args.eps, Cut::longer_side), factor_(n_, 0) {
    const std::vector<A> weight = read_rows<A>(args.weight, n_, A(1));
    double mass = 0;
    for (std::int64_t i = 0; i < n_; ++i)
      if (counts(i)) mass += factor_[i] = weight[i];
    if (args.reduction == Reduction::mean && mass != 0)
      for (double& factor : factor_) factor /= mass;
  }

  void forward(const ProxyOut& out) {
    A *same = static_cast<A*>(out.same), *different = static_cast<A*>(out.different);
    A* value = static_cast<A*>(out.value);
    const bool smooth = args_.label_smoothing > 0;
    std::vector<A> sum_same(smooth ? n_ : 0), sum_different(smooth ? n_ : 0);
    if (n_ > 0)
      masked_logsumexp_fwd<P>(comparison_, labels(), logit(),
                              {same, different, smooth ? sum_same.data() : nullptr, sum_different.data()});
    double total = 0;
    for (std::int64_t i = 0; i < n_; ++i) {
      double row = counts(i) ? loss(i, same[i], different[i]) : 0;
      if (counts(i) && smooth)
        row += args_.label_smoothing *
               ((elsewhere(i) ? A(0) : same[i]) - (double(sum_same[i]) + sum_different[i]) / double(args_.w.rows));
      if (counts(i)) row *= factor_[i];
      if (args_.reduction == Reduction::none) value[i] = A(row);
      total += row;
    }
    if (args_.reduction != Reduction::none) *value = A(total);
  }

  void backward(const Vector& grad, const Vector& same, const Vector& different, const ProxyTargets& targets) {
    std::vector<A> incoming(n_), lse_same(n_), lse_different(n_), g_same(n_, 0), g_different(n_, 0);
    std::vector<A> g_sums(args_.label_smoothing > 0 ? n_ : 0);
    read_values(grad, 0, n_, incoming.data()), read_values(same, 0, n_, lse_same.data()),
        read_values(different, 0, n_, lse_different.data());
    for (std::int64_t i = 0; i < n_; ++i) {
      if (!counts(i)) continue;
      const double h = incoming[i] * factor_[i], pull = h * slope(i, lse_same[i], lse_different[i]);
      g_different[i] = A(pull), g_same[i] = A(h * args_.label_smoothing - pull);
      if (!g_sums.empty()) g_sums[i] = A(-h * args_.label_smoothing / double(args_.w.rows));
    }
    const LseGrads grads{vector_of(g_same), vector_of(g_different), vector_of(g_sums),
                         vector_of(g_sums), vector_of(lse_same),    vector_of(lse_different)};
    masked_logsumexp_bwd<P>(comparison_, labels(), logit(), grads, {targets.x, targets.w, targets.scale, {}});
  }

 private:
  static constexpr A minus_infinity = -std::numeric_limits<A>::infinity();

  bool counts(std::int64_t i) const { return args_.y[i] != args_.ignore; }

  // Whether the proxy of the row's class is not among these.
  bool elsewhere(std::int64_t i) const {
    return args_.y[i] < args_.first_class || args_.y[i] - args_.first_class >= args_.w.rows;
  }

  // log(1 + exp(u)) with u = L- - L+. Where the positive is left out of the sum, u itself, and 0 for a row without
  // negatives. L- for a row without a positive.
  double loss(std::int64_t i, A same, A different) const {
    if (elsewhere(i)) return different;
    if (args_.exclude_positive && different == minus_infinity) return 0;
    const double u = double(different) - same;
    return args_.exclude_positive || u > 40 ? u : std::log1p(std::exp(u));
  }

  double slope(std::int64_t i, A same, A different) const {
    if (elsewhere(i)) return 1;
    if (args_.exclude_positive) return different == minus_infinity ? 0 : 1;
    return 1 / (1 + std::exp(double(same) - different));
  }

  Labels labels() const { return {args_.y, nullptr, nullptr, args_.ignore, args_.first_class}; }
  PolicyLogitArgs logit() const { return {{args_.factor, 0, args_.factor, 0, args_.scale, {}}}; }

  const ProxyArgs& args_;
  std::int64_t n_;
  Comparison<P> comparison_;
  std::vector<double> factor_;  // each row's weight, over the total weight for a mean
};

}  // namespace

template <class P>
void proxy_nca_fwd(const ProxyArgs& args, const ProxyOut& out) {
  ProxyNca<P>(args).forward(out);
}

template <class P>
void proxy_nca_bwd(const ProxyArgs& args, const Vector& grad, const Vector& same, const Vector& different,
                   const ProxyTargets& targets) {
  ProxyNca<P>(args).backward(grad, same, different, targets);
}

#define DML_INSTANTIATE(P)                                           \
  template void proxy_nca_fwd<P>(const ProxyArgs&, const ProxyOut&); \
  template void proxy_nca_bwd<P>(const ProxyArgs&, const Vector&, const Vector&, const Vector&, const ProxyTargets&);
DML_INSTANTIATE(float)
DML_INSTANTIATE(double)
DML_INSTANTIATE(bf16)
#undef DML_INSTANTIATE

}  // namespace dml::cpu
