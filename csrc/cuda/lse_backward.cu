// masked_logsumexp backward, and that of the fused Proxy-NCA: both are weights of pairs, see gradients.cuh.
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

  // What pairs give their own side beside the score's gradient: of a row's scale; of a column's scale and bias.
  struct Extra {
    double scale = 0, column_scale = 0, bias = 0;

    __device__ void merge() {
      for (int bits = other_lanes / 2; bits; bits /= 2) {
        scale += __shfl_xor_sync(every_lane, scale, bits);
        column_scale += __shfl_xor_sync(every_lane, column_scale, bits);
        bias += __shfl_xor_sync(every_lane, bias, bits);
      }
    }
  };

  __device__ Target targets_x() const { return targets.x; }
  __device__ Target targets_w() const { return targets.w; }

  // The incoming gradient of a row's log-sum-exp over its set.
  __device__ A incoming(std::int64_t i, bool same) const {
    if (!grads.loss.value) return load<A>(same ? grads.same : grads.different, i, A(0));
    A g = load<A>(grads.same, i, A(0));
    if (grads.loss.reduction == Reduction::mean) {
      const A counted = *static_cast<const A*>(grads.loss.counted);
      g /= counted > A(1) ? counted : A(1);
    }
    g *= proxy_nca_slope(grads.loss, static_cast<const A*>(grads.lse_same)[i],
                         static_cast<const A*>(grads.lse_different)[i]);
    return same ? -g : g;
  }

  __device__ A pair(const Comparison& problem, std::int64_t i, std::int64_t j, A raw, Extra& extra) const {
    const RowInfo<A> row(labels, args, i, problem.x.rows);
    const ColumnInfo<A> column(labels, args, j, problem.w.rows);
    const A s = score(problem.metric, raw);
    const PairLogit<A> logit(row, column, args, s);
    if (!logit.used) return 0;
    const A lse = static_cast<const A*>(logit.same ? grads.lse_same : grads.lse_different)[i];
    A dz = lse == A(-INFINITY) ? A(0) : incoming(i, logit.same) * exp(logit.z - lse);
    dz += load<A>(logit.same ? grads.sum_same : grads.sum_different, i, A(0));
    extra.bias += dz;
    dz *= logit.k;
    extra.scale += dz * (column.scale * s - logit.o);
    dz *= row.scale;
    extra.column_scale += dz * s;
    dz *= column.scale;
    return problem.metric == Metric::euclidean ? dz * root_slope(s) : dz;
  }

  __device__ void write(const Extra& extra, bool own_is_row, std::int64_t at) const {
    const auto to = [at](Target target, double value) {
      if (target.data) store(target.data, target.dtype, at, A(value));
    };
    if (own_is_row) return to(targets.scale, extra.scale);
    to(targets.col_scale, extra.column_scale), to(targets.col_bias, extra.bias);
  }
};

}  // namespace

std::size_t backward_bytes(const Comparison& problem) { return gradients::scratch_bytes(problem); }

Failure lse_backward(const Comparison& problem, const Labels& labels, const LogitArgs& args, const LseGrads& grads,
                     const LseTargets& targets, void* scratch, Stream stream) {
  const auto blocks = gradients::blocks_of(problem, targets.x.data || targets.scale.data,
                                           targets.w.data || targets.col_scale.data || targets.col_bias.data);
  return with_accumulation(problem.wide, [&](auto zero) {
    using A = decltype(zero);
    return gradients::launch<A>(problem, LseWeights<A>{labels, args, grads, targets}, blocks, scratch, stream);
  });
}

}  // namespace dml::cuda
