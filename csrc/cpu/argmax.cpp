// masked_argmax: the best candidate of each set, by score or by a random draw. Of equal candidates the one with the
// lowest bank index wins.
//
// A draw takes the candidate with the largest key log w(s) + G, where G is Gumbel noise made from a uniform number t.
// Because -log(1 - t) >= t, a key above `best` needs t < w exp(-best). With an upper bound of w from a table, nearly
// every candidate is rejected before a logarithm is computed.
#include <cmath>

#include "../core/noise.h"
#include "sets.h"

namespace dml::cpu {
namespace {

template <class A>
struct Best {
  double key = -std::numeric_limits<double>::infinity();
  double reach = std::numeric_limits<double>::infinity();  // for a draw, Weight::reach_of(key)
  std::int64_t index = -1, count = 0;
  A score = 0;

  // Returns whether the candidate was taken. Of equal keys the first stays.
  bool offer(double candidate, std::int64_t j, A s) {
    if (!(candidate > key)) return false;
    key = candidate, index = j, score = s;
    return true;
  }
};

// log w of a squared distance d2 between unit vectors, and an upper bound of w.
class Weight {
 public:
  Weight(const ArgmaxArgs& args, std::int64_t d)
      : low_(args.cutoff * args.cutoff), high_(std::min(args.nonzero_loss_cutoff * args.nonzero_loss_cutoff, 4.0)),
        on_log_(0.5 * double(2 - d)), on_log1p_(0.5 * double(d - 3)) {
    if (!args.noise || !(low_ < high_)) return;
    // In two or more dimensions the weight over an interval is largest at one of its ends.
    const double step = (high_ - low_) / bins, slack = step / 64;
    largest_ = std::max(log_weight(low_), log_weight(high_ * (1 - 1e-9)));
    for (std::int64_t b = 0; b < bins; ++b) {
      const double from = std::max(low_ + double(b) * step - slack, low_ / 2);
      const double to = std::min(low_ + double(b + 1) * step + slack, 4.0);
      const double most = std::max(log_weight(from), log_weight(to)) - largest_;
      // Not so small that its product with exp(largest - best) would be subnormal.
      bound_[b] = d < 2 ? infinity : std::max(std::exp(most) * (1 + 1e-9), 1e-280);
    }
    per_unit_ = 1 / step;
  }

  bool usable(double& d2) const {
    d2 = d2 < low_ ? low_ : d2;
    return d2 >= low_ && d2 < high_;  // both are false where a cutoff is NaN
  }

  // Whether the uniform number t can give a key above the best one; `reach` is reach_of(best).
  bool may_win(double d2, double t, double reach) const {
    const std::int64_t b = std::min<std::int64_t>(std::int64_t((d2 - low_) * per_unit_), bins - 1);
    return !(t >= bound_[b] * reach);
  }

  double reach_of(double best) const { return std::exp(largest_ - best) * (1 + 1e-9); }

  double log_weight(double d2) const { return std::log(d2) * on_log_ - std::log1p(-0.25 * d2) * on_log1p_; }

 private:
  static constexpr double infinity = std::numeric_limits<double>::infinity();
  static constexpr std::int64_t bins = 1024;
  double low_, high_, on_log_, on_log1p_, largest_ = 0, per_unit_ = 0;
  double bound_[bins];
};

double squared_distance(Metric metric, double s) {
  if (metric == Metric::dot) return 2 - 2 * s;
  return metric == Metric::sqeuclidean ? -s : s * s;
}

// The closed interval in which the scores of a row's candidates lie.
template <class A>
struct Interval {
  static constexpr A infinity = std::numeric_limits<A>::infinity();
  A low = -infinity, high = infinity;

  Interval(const ArgmaxArgs& args, const std::vector<A>& lows, const std::vector<A>& highs, std::int64_t i) {
    if (args.low) low = std::nextafter(lows[i], infinity);
    if (args.high) high = std::nextafter(highs[i], -infinity);
  }

  bool holds(A s) const { return s >= low && s <= high; }
};

// Counts the candidates of a row in a tile, for each set, and offers the best of them.
template <class P>
class Chooser {
 public:
  using A = Acc<P>;

  Chooser(const Comparison<P>& comparison, const ArgmaxArgs& args)
      : comparison_(comparison), args_(args), weight_(args, comparison.x.cols),
        lows_(read_rows<A>(args.low, comparison.x.rows, A(0))),
        highs_(read_rows<A>(args.high, comparison.x.rows, A(0))) {}

  void same(const SetWalk<P>& walk, std::int64_t i, Best<A>& best) const {
    const Interval<A> interval(args_, lows_, highs_, i);
    const double sign = args_.largest_same ? 1 : -1;
    const std::uint64_t start = noise_row(args_.seed, i);
    for (std::size_t p = 0; p < walk.same.size(); ++p) {
      const A s = walk.same[p];
      const std::int64_t j = walk.scores.first + walk.at[p];
      if (!interval.holds(s)) continue;
      if (args_.noise) {
        draw(start, j, s, best);
      } else {
        const double key = sign * double(s);
        if (key > -std::numeric_limits<double>::infinity()) ++best.count, best.offer(key, j, s);
      }
    }
  }

  // Overwrites walk.scores.z.
  void different(SetWalk<P>& walk, std::int64_t i, Best<A>& best) const {
    const auto& kernels = row_kernels<A>();
    const Interval<A> interval(args_, lows_, highs_, i);
    const A sign = args_.noise || args_.largest_different ? A(1) : A(-1);
    A* z = walk.scores.z.data();
    const std::int64_t n = walk.scores.count, first = walk.scores.first;
    kernels.within(z, sign, interval.low, interval.high, n);
    walk.keep_others();
    if (args_.noise) {
      const std::uint64_t start = noise_row(args_.seed, i);
      for (std::int64_t j = 0; j < n; ++j)
        if (z[j] > SetWalk<P>::minus_infinity) draw(start, first + j, z[j], best);
      return;
    }
    best.count += kernels.count_used(z, n);
    const A most = kernels.max(z, n);
    if (!(double(most) > best.key)) return;
    const std::int64_t j = std::find(z, z + n, most) - z;
    best.offer(double(most), first + j, sign * most);
  }

 private:
  void draw(std::uint64_t start, std::int64_t j, A s, Best<A>& best) const {
    double d2 = squared_distance(comparison_.metric, double(s));
    if (!weight_.usable(d2)) return;
    ++best.count;
    const double t = noise_uniform(noise_bits(start, j));
    if (!weight_.may_win(d2, t, best.reach)) return;
    if (best.offer(weight_.log_weight(d2) + gumbel(t), j, s)) best.reach = weight_.reach_of(best.key);
  }

  const Comparison<P>& comparison_;
  const ArgmaxArgs& args_;
  Weight weight_;
  std::vector<A> lows_, highs_;
};

}  // namespace

template <class P>
void masked_argmax(const Comparison<P>& comparison, const Labels& labels, const ArgmaxArgs& args, const ArgmaxOut& same,
                   const ArgmaxOut& different) {
  using A = Acc<P>;
  const std::int64_t n = comparison.x.rows, slices = comparison.plan.slices;
  const LabelIndex index(labels, n);
  const Chooser<P> choose(comparison, args);
  std::vector<Best<A>> bests_same(args.same ? slices * n : 0), bests_different(args.different ? slices * n : 0);
  for_slices(comparison.plan, [&](std::int64_t first_slice, std::int64_t last_slice) {
    SetWalk<P> walk(comparison, labels, index, false);
    const auto load = [&](std::int64_t tile) { walk.load(tile); };
    for (std::int64_t slice = first_slice; slice < last_slice; ++slice) {
      const auto row = [&](std::int64_t, std::int64_t i) {
        if (index.ignored(i)) return;
        walk.score(i);
        if (args.same) choose.same(walk, i, bests_same[slice * n + i]);
        if (args.different) choose.different(walk, i, bests_different[slice * n + i]);
      };
      walk_slice(comparison.plan, slice, walk.scores, load, row, nothing, nothing);
    }
  });
  const auto write = [&](const std::vector<Best<A>>& bests, const ArgmaxOut& out, bool largest) {
    if (bests.empty()) return;
    const A worst = std::numeric_limits<A>::infinity() * (largest || args.noise ? A(-1) : A(1));
    for (std::int64_t i = 0; i < n; ++i) {
      Best<A> total;
      for (std::int64_t slice = 0; slice < slices; ++slice) {
        const Best<A>& part = bests[slice * n + i];
        total.offer(part.key, part.index, part.score), total.count += part.count;
      }
      out.index[i] = total.index, out.count[i] = total.count;
      static_cast<A*>(out.score)[i] = total.index < 0 ? worst : total.score;
    }
  };
  write(bests_same, same, args.largest_same);
  write(bests_different, different, args.largest_different);
}

#define DML_INSTANTIATE(P)                                                                                 \
  template void masked_argmax<P>(const Comparison<P>&, const Labels&, const ArgmaxArgs&, const ArgmaxOut&, \
                                 const ArgmaxOut&);
DML_INSTANTIATE(float)
DML_INSTANTIATE(double)
DML_INSTANTIATE(bf16)
#undef DML_INSTANTIATE

}  // namespace dml::cpu
