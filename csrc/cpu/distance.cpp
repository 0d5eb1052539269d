// normalize, normalized_distance (the whole N x M matrix of similarities or distances), and their gradients.
#include "ops.h"

namespace dml::cpu {

template <class P>
void distance_fwd(const Comparison<P>& comparison, Target out) {
  using A = Acc<P>;
  const Plan& plan = comparison.plan;
  const std::int64_t m = comparison.w.rows;
  const A sign = comparison.metric == Metric::dot ? A(1) : A(-1);
  for_slices(plan, [&](std::int64_t first_slice, std::int64_t last_slice) {
    TileScores<P> scores(comparison);
    const auto load = [&](std::int64_t tile) { scores.load(tile); };
    const auto row = [&](std::int64_t, std::int64_t i) {
      scores.score_row(i, sign, A(0), nullptr, false);
      write_values(scores.z.data(), out.data, out.dtype, i * m + scores.first, scores.count);
    };
    for (std::int64_t slice = first_slice; slice < last_slice; ++slice)
      walk_slice(plan, slice, scores, load, row, nothing, nothing);
  });
}

template <class P>
void distance_bwd(const Comparison<P>& comparison, const Matrix& grad, Target grad_x, Target grad_w) {
  using A = Acc<P>;
  const auto& kernels = row_kernels<A>();
  const Plan& plan = comparison.plan;
  const A sign = comparison.metric == Metric::dot ? A(1) : A(-1);
  Gradients<P> gradients(comparison, grad_x, grad_w);
  for_slices(plan, [&](std::int64_t first_slice, std::int64_t last_slice) {
    TileScores<P> scores(comparison);
    typename Gradients<P>::Worker out(gradients, scores);
    std::vector<A> ds(plan.tile_columns);
    const A* root = comparison.metric == Metric::euclidean ? scores.s.data() : nullptr;
    Matrix columns = grad;  // those of the tile; an expanded grad has strides of 0
    const auto begin = [&](std::int64_t tile) {
      scores.load(tile);
      out.begin_tile();
      columns.cols = scores.count;
      columns.data = static_cast<const char*>(grad.data) + scores.first * grad.col_stride * bytes_of(grad.dtype);
    };
    const auto row = [&](std::int64_t local, std::int64_t i) {
      scores.score_row(i, A(1), A(0), nullptr, true);
      read_row(columns, i, ds.data());
      if (root) kernels.root_grad(ds.data(), root, scores.count);
      out.row(local, i, ds.data(), sign);
    };
    const auto block = [&](std::int64_t first, std::int64_t rows) { out.end_block(first, rows); };
    for (std::int64_t slice = first_slice; slice < last_slice; ++slice) {
      out.begin_slice(slice);
      walk_slice(plan, slice, scores, begin, row, block, [&] { out.end_tile(); });
    }
  });
  gradients.finish();
}

namespace {

// fp64 rows are computed in double, all others in float.
template <class Function>
void with_accumulation(Dtype dtype, Function function) {
  if (dtype == Dtype::f64) return function(double{});
  function(float{});
}

template <class A>
A inverse_norm(const A* x, std::int64_t d, double eps, bool& unit) {
  const A norm = std::sqrt(row_kernels<A>().dot(x, x, d));
  unit = !(norm < A(eps));
  return A(1) / (unit ? norm : A(eps));
}

}  // namespace

void normalize_fwd(const Matrix& x, double eps, Target out) {
  with_accumulation(x.dtype, [&](auto zero) {
    using A = decltype(zero);
    torch::stable::parallel_for(0, x.rows, 64, [&](std::int64_t begin, std::int64_t end) {
      std::vector<A> row(x.cols);
      bool unit;
      for (std::int64_t i = begin; i < end; ++i) {
        read_row(x, i, row.data());
        const A r = inverse_norm(row.data(), x.cols, eps, unit);
        row_kernels<A>().scale_each(row.data(), r, nullptr, row.data(), x.cols);
        write_values(row.data(), out.data, out.dtype, i * x.cols, x.cols);
      }
    });
  });
}

void normalize_bwd(const Matrix& grad, const Matrix& x, double eps, Target out) {
  with_accumulation(x.dtype, [&](auto zero) {
    using A = decltype(zero);
    const auto& kernels = row_kernels<A>();
    torch::stable::parallel_for(0, x.rows, 64, [&](std::int64_t begin, std::int64_t end) {
      std::vector<A> row(x.cols), g(x.cols);
      bool unit;
      for (std::int64_t i = begin; i < end; ++i) {
        read_row(x, i, row.data());
        read_row(grad, i, g.data());
        const A r = inverse_norm(row.data(), x.cols, eps, unit);
        kernels.scale_each(row.data(), r, nullptr, row.data(), x.cols);
        if (unit) kernels.axpy(g.data(), -kernels.dot(row.data(), g.data(), x.cols), row.data(), x.cols);
        kernels.scale_each(g.data(), r, nullptr, g.data(), x.cols);
        write_values(g.data(), out.data, out.dtype, i * x.cols, x.cols);
      }
    });
  });
}

#define DML_INSTANTIATE(P)                                     \
  template void distance_fwd<P>(const Comparison<P>&, Target); \
  template void distance_bwd<P>(const Comparison<P>&, const Matrix&, Target, Target);
DML_INSTANTIATE(float)
DML_INSTANTIATE(double)
DML_INSTANTIATE(bf16)
#undef DML_INSTANTIATE

}  // namespace dml::cpu
