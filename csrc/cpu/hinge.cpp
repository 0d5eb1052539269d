// masked_hinge_sum: sums and counts the positive terms of each set. In the backward all positive terms of a row and set
// have the same slope.
#include "sets.h"

namespace dml::cpu {
namespace {

// The argument of a hinge. The backward must find the same positive terms as the forward, so both use this function.
template <class A>
inline A argument(A s, A k, A offset) {
  return k * s + offset;
}

template <class A>
struct RowSums {
  double same = 0, different = 0;
  std::int64_t count_same = 0, count_different = 0;
};

// The factors of both sets, and the offset of each row.
template <class A>
struct Lines {
  A k_same, k_different;
  std::vector<A> same, different;

  Lines(const HingeArgs& args, std::int64_t n)
      : k_same(A(args.k_same)), k_different(A(args.k_different)), same(read_rows<A>(args.offset_same, n, A(0))),
        different(read_rows<A>(args.offset_different, n, A(0))) {}
};

}  // namespace

template <class P>
void masked_hinge_sum_fwd(const Comparison<P>& comparison, const Labels& labels, const HingeArgs& args,
                          const HingeOut& out) {
  using A = Acc<P>;
  const auto& kernels = row_kernels<A>();
  const std::int64_t n = comparison.x.rows;
  const LabelIndex index(labels, n);
  const Lines<A> lines(args, n);
  std::vector<RowSums<A>> sums(comparison.plan.slices * n);
  for_slices(comparison.plan, [&](std::int64_t first_slice, std::int64_t last_slice) {
    SetWalk<P> walk(comparison, labels, index, false);
    RowSums<A>* slice_sums = nullptr;
    const auto load = [&](std::int64_t tile) { walk.load(tile); };
    const auto row = [&](std::int64_t, std::int64_t i) {
      if (index.ignored(i)) return;
      walk.score(i);
      RowSums<A>& row_sums = slice_sums[i];
      for (const A s : walk.same) {
        const A term = argument(s, lines.k_same, lines.same[i]);
        if (!(term <= A(0))) row_sums.same += term, ++row_sums.count_same;
      }
      A* z = walk.scores.z.data();
      kernels.affine(z, lines.k_different, lines.different[i], walk.scores.count);
      walk.keep_others();
      row_sums.different += kernels.sum_positive(z, walk.scores.count, row_sums.count_different);
    };
    for (std::int64_t slice = first_slice; slice < last_slice; ++slice) {
      slice_sums = sums.data() + slice * n;
      walk_slice(comparison.plan, slice, walk.scores, load, row, nothing, nothing);
    }
  });
  for (std::int64_t i = 0; i < n; ++i) {
    RowSums<A> total;
    for (std::int64_t slice = 0; slice < comparison.plan.slices; ++slice) {
      const RowSums<A>& part = sums[slice * n + i];
      total.same += part.same, total.different += part.different;
      total.count_same += part.count_same, total.count_different += part.count_different;
    }
    static_cast<A*>(out.same)[i] = A(total.same);
    static_cast<A*>(out.different)[i] = A(total.different);
    out.count_same[i] = total.count_same, out.count_different[i] = total.count_different;
  }
}

template <class P>
void masked_hinge_sum_bwd(const Comparison<P>& comparison, const Labels& labels, const HingeArgs& args,
                          const HingeSlopes& slopes, Target grad_x, Target grad_w) {
  using A = Acc<P>;
  const auto& kernels = row_kernels<A>();
  const std::int64_t n = comparison.x.rows;
  const LabelIndex index(labels, n);
  const Lines<A> lines(args, n);
  const auto same = read_rows<A>(slopes.same, n, A(0)), different = read_rows<A>(slopes.different, n, A(0)),
             label_column = read_rows<A>(slopes.label_column, n, A(0));
  const bool root = comparison.metric == Metric::euclidean;
  Gradients<P> gradients(comparison, grad_x, grad_w);
  for_slices(comparison.plan, [&](std::int64_t first_slice, std::int64_t last_slice) {
    SetWalk<P> walk(comparison, labels, index, root);
    typename Gradients<P>::Worker out(gradients, walk.scores);
    const auto row = [&](std::int64_t local, std::int64_t i) {
      if (index.ignored(i)) return out.empty_row(local);
      walk.score(i);
      A* ds = walk.scores.z.data();
      const std::int64_t count = walk.scores.count;
      kernels.affine(ds, lines.k_different, lines.different[i], count);
      walk.keep_others();
      kernels.indicate(ds, different[i], count);
      for (std::size_t p = 0; p < walk.same.size(); ++p)
        if (!(argument(walk.same[p], lines.k_same, lines.same[i]) <= A(0))) ds[walk.at[p]] = same[i];
      const std::int64_t column = labels.y[i] - walk.scores.first;
      if (slopes.label_column && column >= 0 && column < count) ds[column] = label_column[i];
      if (root) kernels.root_grad(ds, walk.scores.s.data(), count);
      out.row(local, i, ds, A(1));
    };
    const auto begin = [&](std::int64_t tile) { walk.load(tile), out.begin_tile(); };
    const auto block = [&](std::int64_t first, std::int64_t rows) { out.end_block(first, rows); };
    for (std::int64_t slice = first_slice; slice < last_slice; ++slice) {
      out.begin_slice(slice);
      walk_slice(comparison.plan, slice, walk.scores, begin, row, block, [&] { out.end_tile(); });
    }
  });
  gradients.finish();
}

#define DML_INSTANTIATE(P)                                                                                         \
  template void masked_hinge_sum_fwd<P>(const Comparison<P>&, const Labels&, const HingeArgs&, const HingeOut&);   \
  template void masked_hinge_sum_bwd<P>(const Comparison<P>&, const Labels&, const HingeArgs&, const HingeSlopes&, \
                                        Target, Target);
DML_INSTANTIATE(float)
DML_INSTANTIATE(double)
DML_INSTANTIATE(bf16)
#undef DML_INSTANTIATE

}  // namespace dml::cpu
