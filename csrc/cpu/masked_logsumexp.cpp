// masked_logsumexp: the logits of a row in a tile are split into those of its label (a short list) and all others (the
// row, with -inf for the entries of the list). The same vector loops reduce both in the forward, and weight both in the
// backward.
#include <cmath>
#include <limits>

#include "../core/online_lse.h"
#include "ops.h"

namespace dml::cpu {
namespace {

// What is the same for every slice of a call.
template <class P>
struct Setup {
  using A = Acc<P>;
  const Comparison<P>& comparison;
  const Labels& labels;
  const PolicyLogitArgs& args;
  LabelIndex index;
  std::vector<A> scale;
  bool one_logit;  // both sets share factor and offset

  Setup(const Comparison<P>& comparison, const Labels& labels, const PolicyLogitArgs& args)
      : comparison(comparison), labels(labels), args(args), index(labels, comparison.x.rows),
        scale(read_rows<A>(args.scale, comparison.x.rows, A(1))),
        one_logit(args.k_same == args.k_different && args.o_same == args.o_different && !args.policy.quadratic()) {}
};

// One thread's walk over the tiles of a slice, the row blocks of a tile and the rows of a block. It splits each row
// into its two sets.
template <class P>
class Walk {
 public:
  using A = Acc<P>;
  static constexpr A minus_infinity = -std::numeric_limits<A>::infinity();

  Walk(const Setup<P>& setup, bool keep_scores, bool gradients)
      : scores(setup.comparison), pool(setup.args.policy, setup.comparison.plan.tile_columns, gradients), setup_(setup),
        keep_scores_(keep_scores || !setup.one_logit), b_(setup.comparison.plan.tile_columns),
        alpha_(setup.args.policy.quadratic() ? setup.comparison.plan.tile_columns : 0) {}

  TileScores<P> scores;
  Pool<A> pool;
  std::int64_t first = 0, count = 0;  // columns of this tile: bank entries, or classes whose centres are pooled
  std::vector<A> same;                // the logits of the row at the entries of its label
  std::vector<A> same_alpha;          // their weights, where the policy is quadratic
  const std::int32_t* positions = nullptr;

  const A* s() const { return setup_.args.policy.pools() ? pool.scores() : scores.s.data(); }
  const A* alpha() const { return alpha_.data(); }

  void load(std::int64_t tile) {
    scores.load(tile);
    first = scores.first / setup_.args.policy.centres, count = scores.count / setup_.args.policy.centres;
    const std::int64_t n = count;
    biased_ = bool(setup_.args.col_bias);
    if (biased_) {
      read_values(setup_.args.col_bias, first, n, b_.data());
    } else {
      std::fill_n(b_.data(), n, A(0));
    }
    setup_.index.pairs_in(first, n, pairs_);
  }

  // Splits row i: the logits of other labels are in scores.z, those of its label, at `positions`, in `same`. In either,
  // an entry that does not belong is -inf.
  void split(std::int64_t i) {
    const PolicyLogitArgs& args = setup_.args;
    const A t = setup_.scale[i];
    logits(i, A(args.k_different) * t, A(args.o_different), biased_ ? b_.data() : nullptr);
    for (const std::int32_t j : pairs_.ignored) scores.z[j] = minus_infinity;  // a bias of -inf would keep a NaN
    positions = pairs_.of(i);
    same.resize(pairs_.count(i));
    if (args.policy.quadratic()) same_alpha.resize(same.size());
    for (std::size_t p = 0; p < same.size(); ++p) {
      const std::int32_t j = positions[p];
      A& z = scores.z[j];
      if (setup_.one_logit) {
        same[p] = z;
      } else {
        const A score = s()[j];
        A kt = A(args.k_same) * t;
        if (args.policy.quadratic()) kt *= same_alpha[p] = std::max(A(1 + args.policy.number) - score, A(0));
        same[p] = logit(score, kt, A(args.o_same), b_[j]);
      }
      if (setup_.labels.excludes(i, first + j)) same[p] = minus_infinity;
      z = minus_infinity;
    }
    setup_.labels.visit_excluded(i, first, count, [this](std::int64_t j) { scores.z[j] = minus_infinity; });
  }

 private:
  // Computes scores.z of row i as if all columns had other labels.
  void logits(std::int64_t i, A kt, A o, const A* b) {
    const Policy& policy = setup_.args.policy;
    if (policy.kind == Policy::Kind::linear) return scores.score_row(i, kt, o, b, keep_scores_);
    scores.score_row(i);
    const Row<A> row{A(1), A(0), kt, o};
    if (policy.quadratic()) {
      row_kernels<A>().circle(s(), row, b, A(policy.number), alpha_.data(), scores.z.data(), count);
    } else {
      pool.pool(scores.s.data(), count);
      row_kernels<A>().logits(Metric::dot, s(), row, {nullptr, nullptr, b}, scores.z.data(), nullptr, count);
    }
  }

  const Setup<P>& setup_;
  bool keep_scores_, biased_ = false;
  std::vector<A> b_, alpha_;
  TilePairs pairs_;
};

// The gradient of a vector that has an element for each column. Where the rows are cut, every slice adds to all
// columns, and has a part of its own.
template <class A>
class ColumnGradient {
 public:
  ColumnGradient(bool wanted, std::int64_t parts, std::int64_t m)
      : parts_(parts), m_(m), sums_(wanted ? parts * m : 0) {}

  bool wanted() const { return !sums_.empty(); }

  // Keeps a tile's sums, which begin at column `first`.
  void keep(std::int64_t slice, std::int64_t first, std::int64_t count, ColumnSum<A>& tile) {
    if (!wanted()) return;
    tile.flush();
    double* to = sums_.data() + (parts_ == 1 ? 0 : slice * m_) + first;
    for (std::int64_t j = 0; j < count; ++j) to[j] = tile[j];
  }

  void write(const Target& target) {
    if (!wanted()) return;
    std::vector<A> total(m_);
    for (std::int64_t j = 0; j < m_; ++j) {
      double sum = 0;
      for (std::int64_t part = 0; part < parts_; ++part) sum += sums_[part * m_ + j];
      total[j] = A(sum);
    }
    write_values(total.data(), target.data, target.dtype, 0, m_);
  }

 private:
  std::int64_t parts_, m_;
  std::vector<double> sums_;
};

// The running results of a row, for both sets.
template <class A>
struct RowState {
  OnlineLse<A> same, different;
  double sum_same = 0, sum_different = 0;
};

}  // namespace

template <class P>
void masked_logsumexp_fwd(const Comparison<P>& comparison, const Labels& labels, const PolicyLogitArgs& args,
                          const LseOut& out) {
  using A = Acc<P>;
  const Setup<P> setup(comparison, labels, args);
  const auto& kernels = row_kernels<A>();
  const std::int64_t n = comparison.x.rows;
  const bool sums = out.sum_same;
  std::vector<RowState<A>> states(comparison.plan.slices * n);
  for_slices(comparison.plan, [&](std::int64_t first_slice, std::int64_t last_slice) {
    Walk<P> walk(setup, false, false);
    RowState<A>* state = nullptr;
    const auto load = [&](std::int64_t tile) { walk.load(tile); };
    const auto row = [&](std::int64_t, std::int64_t i) {
      if (setup.index.ignored(i)) return;
      walk.split(i);
      const auto reduce = [&](const A* z, std::int64_t count, OnlineLse<A>& lse, double& sum) {
        const A max = kernels.max(z, count), above = max == Walk<P>::minus_infinity ? A(0) : max;
        lse.add(above, kernels.sum_exp(z, count, above));  // a NaN that the maximum misses is in the sum
        if (sums) sum += kernels.sum_used(z, count);
      };
      reduce(walk.scores.z.data(), walk.count, state[i].different, state[i].sum_different);
      if (!walk.same.empty()) reduce(walk.same.data(), walk.same.size(), state[i].same, state[i].sum_same);
    };
    for (std::int64_t slice = first_slice; slice < last_slice; ++slice) {
      state = states.data() + slice * n;
      walk_slice(comparison.plan, slice, walk.scores, load, row, nothing, nothing);
    }
  });
  for (std::int64_t i = 0; i < n; ++i) {
    RowState<A> total;
    for (std::int64_t slice = 0; slice < comparison.plan.slices; ++slice) {
      const RowState<A>& part = states[slice * n + i];
      total.same.add(part.same), total.different.add(part.different);
      total.sum_same += part.sum_same, total.sum_different += part.sum_different;
    }
    static_cast<A*>(out.same)[i] = total.same.value();
    static_cast<A*>(out.different)[i] = total.different.value();
    if (sums) {
      static_cast<A*>(out.sum_same)[i] = A(total.sum_same);
      static_cast<A*>(out.sum_different)[i] = A(total.sum_different);
    }
  }
}

template <class P>
void masked_logsumexp_bwd(const Comparison<P>& comparison, const Labels& labels, const PolicyLogitArgs& args,
                          const LseGrads& grads, const LseTargets& targets) {
  using A = Acc<P>;
  const Setup<P> setup(comparison, labels, args);
  const auto& kernels = row_kernels<A>();
  const std::int64_t n = comparison.x.rows, slices = comparison.plan.slices;
  const auto per_row = [n](const Vector& v) { return read_rows<A>(v, n, A(0)); };
  const auto g_same = per_row(grads.same), g_different = per_row(grads.different);
  const auto h_same = per_row(grads.sum_same), h_different = per_row(grads.sum_different);
  auto lse_same = per_row(grads.lse_same), lse_different = per_row(grads.lse_different);
  // The weights of an empty set are exp(z - inf) = 0.
  for (auto* lse : {&lse_same, &lse_different})
    for (A& value : *lse)
      if (value == Walk<P>::minus_infinity) value = -value;

  const bool scale_grads = targets.scale.data;
  std::vector<double> grad_scale(targets.scale.data ? slices * n : 0);
  Gradients<P> gradients(comparison, targets.x, targets.w);
  const std::int64_t column_parts = comparison.plan.by_rows ? slices : 1;
  const std::int64_t columns = comparison.w.rows / args.policy.centres;
  ColumnGradient<A> columns_b(targets.col_bias.data, column_parts, columns);
  for_slices(comparison.plan, [&](std::int64_t first_slice, std::int64_t last_slice) {
    const bool root = comparison.metric == Metric::euclidean;
    Walk<P> walk(setup, root || scale_grads, true);
    typename Gradients<P>::Worker out(gradients, walk.scores);
    double* row_scale = nullptr;  // this slice's part of the scale's gradient
    ColumnSum<A> db;              // the gradient of the bias in this tile
    std::int64_t at_slice = 0;
    const auto begin = [&](std::int64_t tile) {
      walk.load(tile), out.begin_tile();
      if (columns_b.wanted()) db.reset(walk.count);
    };
    const auto row = [&](std::int64_t local, std::int64_t i) {
      if (setup.index.ignored(i)) return out.empty_row(local);
      walk.split(i);
      A *dz = walk.scores.z.data(), *same = walk.same.data();
      const std::int64_t count = walk.count, same_count = walk.same.size();
      const std::int32_t* at = walk.positions;
      kernels.weights(dz, count, lse_different[i], g_different[i], h_different[i]);
      kernels.weights(same, same_count, lse_same[i], g_same[i], h_same[i]);
      if (columns_b.wanted()) {
        A* sum = db.next();
        kernels.add(sum, dz, count);
        for (std::int64_t p = 0; p < same_count; ++p) sum[at[p]] += same[p];
      }
      // Where the sets have different factors, or the gradient of the scale is wanted, dz includes k from here on: it
      // is the gradient of t (s - o). Otherwise the common k is applied at the end.
      const bool inside = scale_grads || !setup.one_logit;
      if (inside) kernels.scale(dz, A(args.k_different), count);
      if (args.policy.quadratic()) {
        kernels.multiply_by(dz, walk.alpha(), count);
        for (std::int64_t p = 0; p < same_count; ++p) same[p] *= walk.same_alpha[p];
      }
      double offsets = scale_grads ? args.o_different * kernels.sum(dz, count) : 0;
      for (std::int64_t p = 0; p < same_count; ++p) {
        dz[at[p]] = inside ? A(args.k_same) * same[p] : same[p];
        offsets += args.o_same * dz[at[p]];
      }
      const A t = setup.scale[i];
      if (scale_grads) {
        const double total = kernels.dot(dz, walk.s(), count);
        row_scale[i] += total - offsets;
      }
      if (args.policy.pools()) {
        dz = walk.pool.spread(dz, count);
      }
      if (root) kernels.root_grad(dz, walk.scores.s.data(), walk.scores.count);
      out.row(local, i, dz, inside ? t : A(args.k_different) * t);
    };
    const auto block = [&](std::int64_t first, std::int64_t rows) { out.end_block(first, rows); };
    const auto end = [&] {
      out.end_tile();
      columns_b.keep(at_slice, walk.first, walk.count, db);
    };
    for (std::int64_t slice = first_slice; slice < last_slice; ++slice) {
      out.begin_slice(slice), at_slice = slice;
      if (!grad_scale.empty()) row_scale = grad_scale.data() + slice * n;
      walk_slice(comparison.plan, slice, walk.scores, begin, row, block, end);
    }
  });
  gradients.finish();
  columns_b.write(targets.col_bias);
  if (!grad_scale.empty()) {
    std::vector<A> total(n);
    for (std::int64_t i = 0; i < n; ++i) {
      double sum = 0;
      for (std::int64_t slice = 0; slice < slices; ++slice) sum += grad_scale[slice * n + i];
      total[i] = A(sum);
    }
    write_values(total.data(), targets.scale.data, targets.scale.dtype, 0, n);
  }
}

#define DML_INSTANTIATE(P)                                                                                            \
  template void masked_logsumexp_fwd<P>(const Comparison<P>&, const Labels&, const PolicyLogitArgs&, const LseOut&);  \
  template void masked_logsumexp_bwd<P>(const Comparison<P>&, const Labels&, const PolicyLogitArgs&, const LseGrads&, \
                                        const LseTargets&);
DML_INSTANTIATE(float)
DML_INSTANTIATE(double)
DML_INSTANTIATE(bf16)
#undef DML_INSTANTIATE

}  // namespace dml::cpu
