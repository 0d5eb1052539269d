// The walk over the bank that every op shares: slices, tiles, row blocks, and the scores of one row in a tile.
//
// The bank is cut into slices; where there are many more rows than bank entries, the rows are. The number of slices
// depends on the shape alone, never on the threads, and partial results are merged in slice order. So there are no
// locks and no atomics, and the bits are the same at any number of threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "side.h"

namespace dml::cpu {

// Which side is cut. A slice of the bank adds to the gradient of every row, a slice of the rows to that of every bank
// entry.
enum class Cut { bank, longer_side };

struct Plan {
  std::int64_t tile_columns, row_block, slices, tiles, rows;
  bool by_rows;

  // Tiles, and so slices of the bank, hold whole groups of `group` bank entries.
  static Plan of(std::int64_t n, std::int64_t m, std::int64_t d, std::int64_t element_size, Cut cut,
                 std::int64_t group = 1);

  // A slice is tiles [first_tile(slice), end_tile(slice)) x rows [first_row(slice), end_row(slice)).
  std::int64_t first_tile(std::int64_t slice) const { return by_rows ? 0 : slice * tiles / slices; }
  std::int64_t end_tile(std::int64_t slice) const { return by_rows ? tiles : (slice + 1) * tiles / slices; }
  std::int64_t first_row(std::int64_t slice) const { return by_rows ? slice * rows / slices : 0; }
  std::int64_t end_row(std::int64_t slice) const { return by_rows ? (slice + 1) * rows / slices : rows; }
};

template <class P>
struct Comparison {
  using A = Acc<P>;
  Matrix x, w;
  Metric metric;
  bool normalize;
  double eps;
  Side<P> rows;
  Plan plan;

  Comparison(Matrix x, Matrix w, Metric metric, bool normalize, double eps, Cut cut, std::int64_t group = 1)
      : x(x), w(w), metric(metric), normalize(normalize), eps(eps),
        plan(Plan::of(x.rows, w.rows, x.cols, sizeof(P), cut, group)) {
    rows.load(x, 0, x.rows, normalize, eps, false);
  }
};

// One thread's buffers, and the bank tile that it works on.
template <class P>
class TileScores {
 public:
  using A = Acc<P>;
  static constexpr bool half = !std::is_same_v<P, A>;

  explicit TileScores(const Comparison<P>& comparison)
      : comparison_(comparison), tile_(comparison.plan.row_block * comparison.plan.tile_columns),
        wide_(half ? comparison.plan.tile_columns : 0), z(comparison.plan.tile_columns),
        s(comparison.plan.tile_columns), u_(comparison.x.cols), p_(comparison.x.cols), buffer_(comparison.x.cols) {}

  Side<P> bank;
  Mat<const P> rows{};                // those multiplied last
  std::int64_t first = 0, count = 0;  // bank entries of this tile

  void load(std::int64_t tile) {
    first = tile * comparison_.plan.tile_columns;
    count = std::min(comparison_.plan.tile_columns, comparison_.w.rows - first);
    bank.load(comparison_.w, first, count, comparison_.normalize, comparison_.eps, true);
  }

  // Computes the raw products of rows [begin, begin + n) with the tile.
  void multiply_rows(std::int64_t begin, std::int64_t n) {
    if (begin != begin_ || n != rows.rows) rows = comparison_.rows.block(begin, n, converted_);
    begin_ = begin;
    multiply<P>(rows, bank.operand.transposed(), memory(n), false);
  }

  // The memory of n rows of the tile: raw products, which a backward overwrites with E.
  Mat<P> memory(std::int64_t n) { return {tile_.data(), n, count, count}; }

  // Computes s of row i; z is the same.
  void score_row(std::int64_t i) { score_row(i, A(1), A(0), nullptr, true); }

  // Computes z of row i with the factor and the offset of a set, and s with `keep_scores`. `near` lists the columns
  // whose distances are computed from differences.
  void score_row(std::int64_t i, A kt, A o, const A* b, bool keep_scores) {
    const Row<A> row{comparison_.rows.r[i], comparison_.rows.sq[i], kt, o};
    const Columns<A> columns{comparison_.normalize ? bank.r.data() : nullptr, bank.sq.data(), b};
    const A* raw = raw_row(i - begin_);
    near.clear();
    if (row_kernels<A>().logits(comparison_.metric, raw, row, columns, z.data(), keep_scores ? s.data() : nullptr,
                                count))
      patch_near(i, raw, row, columns, keep_scores);
  }

  // u_i - p_j for a near pair, D values.
  const A* difference(std::int64_t i, std::int64_t j) {
    scaled(comparison_.rows, i, u_.data());
    scaled(bank, j, p_.data());
    for (std::size_t k = 0; k < u_.size(); ++k) u_[k] -= p_[k];
    return u_.data();
  }

  std::vector<std::int32_t> near;

 private:
  const A* raw_row(std::int64_t local) {
    P* row = tile_.data() + local * count;
    if constexpr (half) {
      row_kernels<A>().widen(row, wide_.data(), count);
      return wide_.data();
    } else {
      return row;
    }
  }

  void scaled(const Side<P>& side, std::int64_t i, A* out) {
    row_kernels<A>().scale_each(side.full(i, buffer_.data()), side.r[i], nullptr, out, comparison_.x.cols);
  }

  void patch_near(std::int64_t i, const A* raw, const Row<A>& row, const Columns<A>& c, bool keep_scores) {
    scaled(comparison_.rows, i, u_.data());
    for (std::int64_t j = 0; j < count; ++j) {
      const A span = row.sq + c.sq[j];
      const A rough = 2 * raw[j] * row.r * (c.r ? c.r[j] : A(1)) - span;
      if (!(rough > -A(near_share) * span)) continue;
      scaled(bank, j, p_.data());
      const A d2 = row_kernels<A>().squared_distance(u_.data(), p_.data(), comparison_.x.cols);
      const A score = comparison_.metric == Metric::euclidean ? -std::sqrt(d2) : -d2;
      z[j] = logit(score, row.kt, row.o, c.b ? c.b[j] : A(0));
      if (keep_scores) s[j] = score;
      near.push_back(std::int32_t(j));
    }
  }

  const Comparison<P>& comparison_;
  std::vector<P> tile_, converted_;
  std::vector<A> wide_;
  std::int64_t begin_ = 0;

 public:
  std::vector<A> z, s;

 private:
  std::vector<A> u_, p_, buffer_;
};

// For every tile of the slice, calls begin(tile), which must load it; row(local, i) for each row, with block(first, n)
// after the n rows of a block; and end().
template <class P, class Begin, class RowStep, class Block, class End>
void walk_slice(const Plan& plan, std::int64_t slice, TileScores<P>& scores, Begin begin, RowStep row, Block block,
                End end) {
  const std::int64_t last_row = plan.end_row(slice);
  for (std::int64_t tile = plan.first_tile(slice); tile < plan.end_tile(slice); ++tile) {
    begin(tile);
    for (std::int64_t first = plan.first_row(slice); first < last_row; first += plan.row_block) {
      const std::int64_t rows = std::min(plan.row_block, last_row - first);
      scores.multiply_rows(first, rows);
      for (std::int64_t local = 0; local < rows; ++local) row(local, first + local);
      block(first, rows);
    }
    end();
  }
}

// A step that a walk does not need.
inline constexpr auto nothing = [](auto...) {};

// Runs body(first, last) over ranges of slices, one range for each thread, which makes its buffers once. There are at
// least two iterations even for one slice: the products inside must see a parallel region, so that each stays on one
// thread, as it does with more slices.
template <class Body>
void for_slices(const Plan& plan, Body body) {
  torch::stable::parallel_for(0, std::max<std::int64_t>(plan.slices, 2), 1, [&](std::int64_t begin, std::int64_t end) {
    end = std::min(end, plan.slices);
    if (begin < end) body(begin, end);
  });
}

}  // namespace dml::cpu
