// The backward of masked_logsumexp and that of the fused Proxy-NCA loss, as Weights of gradients.cuh.
#include "gradients.cuh"
#include "proxy_nca.cuh"

namespace dml::cuda {
namespace {

template <class A>
struct LseWeights {
  Labels labels;
  LogitArgs args;
  LseGrads grads;
  LseTargets targets;
  ProxyNca loss;

  // What pairs give the owned side in addition to the score's gradient: the gradient of a row's scale, or of a column's
  // bias.
  struct Extra {
    double scale = 0, bias = 0;
    A divisor;  // of a mean, for a Proxy-NCA loss

    __device__ Extra(const LseWeights& weights, const Comparison& comparison, double* parts)
        : divisor(weights.loss.wanted ? proxy_nca_divisor<A>(weights.loss, weights.labels, comparison.x.rows, parts)
                                      : A(1)) {}

    __device__ void merge() {
      for (int bits = other_lanes / 2; bits; bits /= 2) {
        scale += __shfl_xor_sync(every_lane, scale, bits);
        bias += __shfl_xor_sync(every_lane, bias, bits);
      }
    }
  };

  __device__ Target targets_x() const { return targets.x; }
  __device__ Target targets_w() const { return targets.w; }

  __device__ A lse(bool same, std::int64_t i) const {
    return static_cast<const A*>((same ? grads.lse_same : grads.lse_different).data)[i];
  }

  // The incoming gradients of a row and a set: g of the log-sum-exp, h of the sum of logits.
  __device__ void incoming(std::int64_t i, bool same, const Comparison& comparison, A divisor, A& g, A& h) const {
    if (!loss.wanted) {
      g = load<A>(same ? grads.same : grads.different, i, A(0));
      h = load<A>(same ? grads.sum_same : grads.sum_different, i, A(0));
      return;
    }
    const A of_row = load<A>(grads.same, i, A(0)) * (load<A>(loss.weight, i, A(1)) / divisor);
    const A slope = proxy_nca_slope(loss, lse(true, i), lse(false, i));
    g = of_row * (same ? A(loss.smoothing) - slope : slope);
    h = -of_row * A(loss.smoothing) / A(comparison.w.rows);
  }

  __device__ A pair(const Comparison& comparison, std::int64_t i, std::int64_t j, A raw, Extra& extra) const {
    const RowInfo<A> row(labels, args, i, comparison.x.rows);
    const ColumnInfo<A> column(labels, args, j, comparison.w.rows);
    const A s = score(comparison.metric, raw);
    const PairLogit<A> logit(row, column, args, s);
    if (!logit.used) return 0;
    const A total = lse(logit.same, i);
    A g, h;
    incoming(i, logit.same, comparison, extra.divisor, g, h);
    A dz = (total == A(-INFINITY) ? A(0) : g * exp(logit.z - total)) + h;
    extra.bias += dz;
    dz *= logit.k;
    extra.scale += dz * (s - logit.o);
    dz *= row.scale;
    return comparison.metric == Metric::euclidean ? dz * root_slope(s) : dz;
  }

  __device__ void write(const Extra& extra, bool owns_rows, std::int64_t at) const {
    const auto to = [at](Target target, double value) {
      if (target.data) store(target.data, target.dtype, at, A(value));
    };
    if (owns_rows) return to(targets.scale, extra.scale);
    to(targets.col_bias, extra.bias);
  }
};

}  // namespace

std::size_t backward_bytes(const Comparison& comparison) { return gradients::scratch_bytes(comparison); }

Failure lse_backward(const Comparison& comparison, const Labels& labels, const LogitArgs& args, const LseGrads& grads,
                     const LseTargets& targets, const ProxyNca& loss, void* scratch, Stream stream) {
  const auto blocks =
      gradients::blocks_of(comparison, targets.x.data || targets.scale.data, targets.w.data || targets.col_bias.data);
  return with_accumulation(comparison.wide, [&](auto zero) {
    using A = decltype(zero);
    return gradients::launch<A>(comparison, LseWeights<A>{labels, args, grads, targets, loss}, blocks, scratch, stream);
  });
}

}  // namespace dml::cuda
