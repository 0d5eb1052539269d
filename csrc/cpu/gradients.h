// Turns the gradients of scores into those of the rows and of the bank, one tile at a time, and merges them in slice
// order.
//
// The gradient of the raw product is E_ij = f dS_ij r_i r_j, with f = 2 for distances. Then dx_i = P_i sum_j E_ij w_j
// and dw_j = P_j sum_i E_ij x_i, where P removes the part along a unit vector. A near pair is left out of E; its
// gradient -2 dS (u - p) is added separately.
#pragma once
#include "tiles.h"

namespace dml::cpu {

// The sum of a vector from each row. Runs of 32 rows are summed in the type of the vectors, and the runs in double, so
// that the error does not grow with the number of rows.
template <class A>
class ColumnSum {
 public:
  void reset(std::int64_t n) { run_.assign(n, A(0)), total_.assign(n, 0), rows_ = 0; }

  // Where to add the next row.
  A* next() {
    if (rows_++ % 32 == 31) flush();
    return run_.data();
  }

  // Element j of the sum. Call flush() first.
  double operator[](std::int64_t j) const { return total_[j]; }

  void flush() {
    for (std::size_t j = 0; j < run_.size(); ++j) total_[j] += run_[j], run_[j] = 0;
  }

 private:
  std::vector<A> run_;
  std::vector<double> total_;
  std::int64_t rows_ = 0;
};

template <class P>
class Gradients {
 public:
  using A = Acc<P>;

  Gradients(const Comparison<P>& comparison, Target grad_x, Target grad_w)
      : comparison_(comparison), x_(grad_x), w_(grad_w),
        row_parts_(comparison.plan.by_rows ? 1 : comparison.plan.slices),
        parts_(grad_x.data ? new A[row_parts_ * rows_size()] : nullptr),
        row_ds_sums_(grad_x.data && distances() ? row_parts_ * comparison.x.rows : 0),
        bank_parts_(grad_w.data && comparison.plan.by_rows ? new A[comparison.plan.slices * bank_size()] : nullptr),
        bank_ds_sums_(bank_parts_ && distances() ? comparison.plan.slices * comparison.w.rows : 0) {}

  // The work of one thread, slice after slice.
  class Worker {
   public:
    Worker(Gradients& all, TileScores<P>& scores)
        : all_(all), scores_(scores), d_(all.comparison_.x.cols), buffer_(d_) {
      if (all.w_.data && !all.bank_parts_) grad_w_.resize(all.comparison_.plan.tile_columns * d_);
      if (TileScores<P>::half)
        half_.resize(std::max(all.comparison_.plan.row_block, all.comparison_.plan.tile_columns) * d_);
    }

    void begin_slice(std::int64_t slice) {
      const Plan& plan = all_.comparison_.plan;
      slice_ = slice;
      if (all_.parts_) {
        part_ = all_.parts_.get() + (plan.by_rows ? 0 : slice * all_.rows_size());
        const std::int64_t first = plan.first_row(slice);
        std::fill_n(part_ + first * d_, (plan.end_row(slice) - first) * d_, A(0));
      }
      if (!all_.row_ds_sums_.empty())
        row_ds_sums_ = all_.row_ds_sums_.data() + (plan.by_rows ? 0 : slice * all_.comparison_.x.rows);
    }

    void begin_tile() {
      bank_ = all_.bank_parts_  ? all_.bank_parts_.get() + slice_ * all_.bank_size() + scores_.first * d_
              : grad_w_.empty() ? nullptr
                                : grad_w_.data();
      if (bank_) std::fill_n(bank_, scores_.count * d_, A(0));
      if (all_.distances()) column_ds_sums_.reset(scores_.count);
    }

    // Takes dS of row i over the tile, which is factor * ds, and overwrites ds. scores_.near lists the near pairs of
    // the row.
    void row(std::int64_t local, std::int64_t i, A* ds, A factor) {
      const auto& comparison = all_.comparison_;
      const auto& kernels = row_kernels<A>();
      const std::int64_t n = scores_.count;
      const Metric metric = comparison.metric;
      if (metric != Metric::dot) {
        for (const std::int32_t j : scores_.near) {
          near_.push_back({i, j, factor * ds[j]});
          ds[j] = 0;
        }
        if (row_ds_sums_ && !comparison.rows.unit[i]) row_ds_sums_[i] += double(factor) * kernels.sum(ds, n);
        if (!scores_.bank.all_unit && all_.w_.data) kernels.axpy(column_ds_sums_.next(), factor, ds, n);
      }
      const A f = (metric == Metric::dot ? factor : 2 * factor) * comparison.rows.r[i];
      const A* r = comparison.normalize ? scores_.bank.r.data() : nullptr;
      P* e = scores_.memory(local + 1).row(local);
      if constexpr (TileScores<P>::half) {
        kernels.scale_each_bf16(ds, f, r, e, n);
      } else {
        kernels.scale_each(ds, f, r, e, n);
      }
    }

    void empty_row(std::int64_t local) {
      P* e = scores_.memory(local + 1).row(local);
      std::fill_n(e, scores_.count, P(0.f));
    }

    // To be called after rows [begin, begin + n) of a tile.
    void end_block(std::int64_t begin, std::int64_t n) {
      const Mat<P> e = scores_.memory(n);
      const Mat<const P> weights{e.data, e.rows, e.cols, e.row_stride};
      if (part_) accumulate(weights, scores_.bank.operand, part_ + begin * d_);
      if (bank_) accumulate(weights.transposed(), scores_.rows, bank_);
      for (const auto& pair : near_) add_near(pair.i, pair.j, pair.ds);
      near_.clear();
    }

    void end_tile() {
      if (all_.distances()) column_ds_sums_.flush();
      if (all_.bank_parts_) {
        for (std::int64_t j = 0; j < scores_.count && all_.distances(); ++j)
          all_.bank_ds_sums_[slice_ * all_.comparison_.w.rows + scores_.first + j] = column_ds_sums_[j];
        return;
      }
      if (!bank_) return;
      for (std::int64_t j = 0; j < scores_.count; ++j) {
        A* grad = bank_ + j * d_;
        scores_.bank.finish(j, grad, all_.distances() ? A(column_ds_sums_[j]) : A(0), buffer_.data());
        write_values(grad, all_.w_.data, all_.w_.dtype, (scores_.first + j) * d_, d_);
      }
    }

   private:
    struct Near {
      std::int64_t i;
      std::int32_t j;
      A ds;
    };

    void accumulate(Mat<const P> a, Mat<const P> b, A* out) {
      if constexpr (TileScores<P>::half) {
        multiply<P>(a, b, {half_.data(), a.rows, d_, d_}, false);
        row_kernels<A>().add_bf16(out, half_.data(), a.rows * d_);
      } else {
        multiply<P>(a, b, {out, a.rows, d_, d_}, true);
      }
    }

    void add_near(std::int64_t i, std::int64_t j, A ds) {
      const auto& kernels = row_kernels<A>();
      const A* difference = scores_.difference(i, j);
      if (part_) kernels.axpy(part_ + i * d_, -2 * ds * all_.comparison_.rows.r[i], difference, d_);
      if (bank_) kernels.axpy(bank_ + j * d_, 2 * ds * scores_.bank.r[j], difference, d_);
    }

    Gradients& all_;
    TileScores<P>& scores_;
    A *part_ = nullptr, *bank_ = nullptr;  // sums for the rows of this slice, the bank entries of this tile
    double* row_ds_sums_ = nullptr;
    std::int64_t d_, slice_ = 0;
    std::vector<A> buffer_, grad_w_;
    ColumnSum<A> column_ds_sums_;
    std::vector<P> half_;
    std::vector<Near> near_;
  };

  // Merges the parts of the slices, in order.
  void finish() {
    if (x_.data) finish_rows();
    if (bank_parts_) finish_bank();
  }

 private:
  void finish_rows() {
    const std::int64_t n = comparison_.x.rows, d = comparison_.x.cols;
    const auto& kernels = row_kernels<A>();
    torch::stable::parallel_for(0, n, 16, [&](std::int64_t begin, std::int64_t end) {
      std::vector<A> total(d), buffer(d);
      for (std::int64_t i = begin; i < end; ++i) {
        std::fill(total.begin(), total.end(), A(0));
        double ds_sum = 0;
        for (std::int64_t part = 0; part < row_parts_; ++part) {
          kernels.add(total.data(), parts_.get() + part * rows_size() + i * d, d);
          if (!row_ds_sums_.empty()) ds_sum += row_ds_sums_[part * n + i];
        }
        comparison_.rows.finish(i, total.data(), A(ds_sum), buffer.data());
        write_values(total.data(), x_.data, x_.dtype, i * d, d);
      }
    });
  }

  void finish_bank() {
    const Plan& plan = comparison_.plan;
    const std::int64_t m = comparison_.w.rows, d = comparison_.x.cols;
    const auto& kernels = row_kernels<A>();
    torch::stable::parallel_for(0, m, 64, [&](std::int64_t begin, std::int64_t end) {
      std::vector<A> total(d), buffer(d);
      Side<P> bank;
      bank.load(comparison_.w, begin, end - begin, comparison_.normalize, comparison_.eps, false);
      for (std::int64_t j = begin; j < end; ++j) {
        std::fill(total.begin(), total.end(), A(0));
        double ds_sum = 0;
        for (std::int64_t slice = 0; slice < plan.slices; ++slice) {
          kernels.add(total.data(), bank_parts_.get() + slice * bank_size() + j * d, d);
          if (!bank_ds_sums_.empty()) ds_sum += bank_ds_sums_[slice * m + j];
        }
        bank.finish(j - begin, total.data(), A(ds_sum), buffer.data());
        write_values(total.data(), w_.data, w_.dtype, j * d, d);
      }
    });
  }

  bool distances() const { return comparison_.metric != Metric::dot; }
  std::int64_t rows_size() const { return comparison_.x.rows * comparison_.x.cols; }
  std::int64_t bank_size() const { return comparison_.w.rows * comparison_.x.cols; }

  const Comparison<P>& comparison_;
  Target x_, w_;
  std::int64_t row_parts_;
  std::unique_ptr<A[]> parts_;        // (row parts, N, D); each slice clears its part
  std::vector<double> row_ds_sums_;   // (row parts, N) sums of dS, for rows that are not unit vectors
  std::unique_ptr<A[]> bank_parts_;   // (slices, M, D) where the rows are cut; each tile clears its part
  std::vector<double> bank_ds_sums_;  // (slices, M), the same for the bank entries
};

}  // namespace dml::cpu
