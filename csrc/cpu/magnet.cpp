// The Magnet loss, forward and backward in one call each. The rows, grouped by cluster, give the means, the distances
// of rows to their centres and the variance. The clusters of other classes go through the tiles of masked_logsumexp.
// The rest is a few passes over the rows.
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "ops.h"

namespace dml::cpu {
namespace {

// The rows that count, cluster by cluster: rows[start[g]] up to rows[start[g + 1]] are in cluster id[g].
struct Groups {
  std::vector<std::int64_t> rows, start{0}, id;

  explicit Groups(const MagnetArgs& args) {
    for (std::int64_t i = 0; i < args.x.rows; ++i) {
      const std::int64_t cluster = args.clusters[i];
      if (cluster == args.ignore) continue;
      if (cluster < 0 || cluster >= args.cluster_count)
        throw std::out_of_range("dml_kernels: a cluster id is out of range");
      if (args.classes[cluster] != args.ignore) rows.push_back(i);
    }
    const std::int64_t* clusters = args.clusters;
    std::stable_sort(rows.begin(), rows.end(), [=](auto a, auto b) { return clusters[a] < clusters[b]; });
    for (std::size_t p = 0; p < rows.size(); ++p) {
      if (p > 0 && clusters[rows[p]] != id.back()) start.push_back(p);
      if (p == 0 || clusters[rows[p]] != id.back()) id.push_back(clusters[rows[p]]);
    }
    if (!rows.empty()) start.push_back(rows.size());
  }

  std::int64_t count() const { return id.size(); }
};

template <class P>
class Magnet {
 public:
  using A = Acc<P>;

  explicit Magnet(const MagnetArgs& args)
      : args_(args), groups_(args), n_(args.x.rows), d_(args.x.cols), distances_(n_), y_(n_, args.ignore) {
    rows_.load(args.x, 0, n_, args.normalize, args.eps, false);
    if (args.normalize) {
      unit_rows_.resize(n_ * d_);
      std::vector<A> buffer(d_);
      for (std::int64_t i = 0; i < n_; ++i)
        kernels_.scale_each(rows_.full(i, buffer.data()), rows_.r[i], nullptr, unit_rows_.data() + i * d_, d_);
    }
    for (const std::int64_t i : groups_.rows) y_[i] = args.classes[args.clusters[i]];
    bank_ = args.centers;
    if (!given()) {
      means_.resize(groups_.count() * d_);
      bank_ = contiguous(means_.data(), groups_.count());
      for (const std::int64_t id : groups_.id) c_.push_back(args.classes[id]);
    }
    measure();
  }

  void forward(const MagnetOut& out) {
    std::vector<A> same(n_);
    A* different = static_cast<A*>(out.different);
    std::fill_n(different, n_, -std::numeric_limits<A>::infinity());
    if (bank_.rows > 0)
      masked_logsumexp_fwd<P>(comparison(), labels(), logit(), {same.data(), different, nullptr, nullptr});
    A* value = static_cast<A*>(out.value);
    if (args_.reduction == Reduction::none) std::fill_n(value, n_, A(0));
    double total = 0;
    for (const std::int64_t i : groups_.rows) {
      const A v = hinge(i, different[i]), kept = v <= A(0) ? A(0) : v;  // NaN stays
      if (args_.reduction == Reduction::none) value[i] = kept;
      total += kept;
    }
    if (args_.reduction != Reduction::none) *value = A(total * weight());
    *static_cast<A*>(out.variance) = A(measured_);
  }

  void backward(const Vector& grad, const Vector& different, const MagnetTargets& targets) {
    std::vector<A> g(n_, A(0)), lse(n_), empty(n_, -std::numeric_limits<A>::infinity()), none(n_, A(0));
    read_values(different, 0, n_, lse.data());
    std::vector<A> incoming(n_);
    read_values(grad, 0, n_, incoming.data());
    double grad_scale = 0;
    for (const std::int64_t i : groups_.rows) {
      if (hinge(i, lse[i]) <= A(0)) continue;
      g[i] = incoming[i] * A(weight());
      grad_scale += double(g[i]) * distances_[i];
    }
    // A variance that is measured from the batch is part of every gradient; a given one only has a gradient itself.
    const bool through_variance = targets.variance.data || !args_.variance;
    std::vector<A> grad_rows(targets.x.data ? n_ * d_ : 0), row_scale(through_variance ? n_ : 0);
    std::vector<A> grad_bank(targets.centers.data || !given() ? bank_.rows * d_ : 0);
    if (bank_.rows > 0) {
      const auto to = [](std::vector<A>& v) { return Target{v.empty() ? nullptr : v.data(), dtype_for<A>}; };
      masked_logsumexp_bwd<P>(comparison(), labels(), logit(),
                              {vector_of(none), vector_of(g), {}, {}, vector_of(empty), vector_of(lse)},
                              {to(grad_rows), to(grad_bank), to(row_scale), {}});
    }
    grad_scale = std::accumulate(row_scale.begin(), row_scale.end(), grad_scale);
    // scale = 1 / (2 variance); at its floor the variance is a constant.
    const double grad_variance = floored() ? 0 : -2 * double(scale_) * double(scale_) * grad_scale;
    if (targets.variance.data) {
      const A value = A(grad_variance);
      write_values(&value, targets.variance.data, targets.variance.dtype, 0, 1);
    }
    finish(g, args_.variance ? 0 : grad_variance / degrees(), grad_rows, grad_bank, targets);
  }

 private:
  bool given() const { return args_.centers.data; }
  bool floored() const { return !(measured_ > args_.min_variance) && measured_ == measured_; }
  double degrees() const { return std::max<double>(double(groups_.rows.size()) - 1, 1); }
  double weight() const {
    return args_.reduction == Reduction::mean ? 1 / std::max<double>(double(groups_.rows.size()), 1) : 1;
  }

  A hinge(std::int64_t i, A different) const { return A(args_.alpha) + scale_ * distances_[i] + different; }

  // Row i as it is compared, in the accumulation type; `buffer` holds D values.
  const A* row(std::int64_t i, A* buffer) const {
    return args_.normalize ? unit_rows_.data() + i * d_ : rows_.full(i, buffer);
  }
  std::int64_t center_index(std::int64_t group) const { return given() ? groups_.id[group] : group; }

  // Centre `index` in the accumulation type; `buffer` holds D values.
  const A* center(std::int64_t index, A* buffer) const {
    if (!given()) return means_.data() + index * d_;
    read_row(bank_, index, buffer);
    return buffer;
  }

  Matrix contiguous(const A* data, std::int64_t rows) const { return {data, dtype_for<A>, rows, d_, d_, 1}; }

  Comparison<P> comparison() const {
    const Matrix rows = args_.normalize ? contiguous(unit_rows_.data(), n_) : args_.x;
    return {rows, bank_, Metric::sqeuclidean, false, args_.eps, Cut::longer_side};
  }
  Labels labels() const { return {y_.data(), given() ? args_.classes : c_.data(), nullptr, args_.ignore}; }
  PolicyLogitArgs logit() const { return {{1, 0, 1, 0, Vector{&scale_, dtype_for<A>, 0}, {}}}; }

  // Calls body(group) for all groups. A thread takes groups with some tens of thousands of numbers.
  template <class Body>
  void each_group(Body body) const {
    const std::int64_t work = std::max<std::int64_t>(groups_.rows.size() * d_, 1);
    const std::int64_t grain = std::max<std::int64_t>(groups_.count() * 32768 / work, 1);
    torch::stable::parallel_for(0, groups_.count(), grain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t group = begin; group < end; ++group) body(group);
    });
  }

  // Computes the means, the distances of rows to their centres, and the variance. One thread takes a whole group, and
  // the sums of the groups are added in order.
  void measure() {
    std::vector<double> part(groups_.count());
    each_group([&](std::int64_t group) {
      const std::int64_t begin = groups_.start[group], end = groups_.start[group + 1];
      std::vector<A> buffer(d_), row_buffer(d_);
      if (!given()) {
        std::vector<double> total(d_);
        for (std::int64_t p = begin; p < end; ++p) {
          const A* r = row(groups_.rows[p], row_buffer.data());
          for (std::int64_t j = 0; j < d_; ++j) total[j] += r[j];
        }
        for (std::int64_t j = 0; j < d_; ++j) means_[group * d_ + j] = A(total[j] / double(end - begin));
      }
      const A* mu = center(center_index(group), buffer.data());
      for (std::int64_t p = begin; p < end; ++p) {
        const std::int64_t i = groups_.rows[p];
        distances_[i] = kernels_.squared_distance(row(i, row_buffer.data()), mu, d_);
        part[group] += distances_[i];
      }
    });
    measured_ = std::accumulate(part.begin(), part.end(), 0.0) / degrees();
    if (args_.variance) {
      A value;
      read_values(args_.variance, 0, 1, &value);
      measured_ = value;
    }
    scale_ = A(0.5 / (floored() ? args_.min_variance : measured_));
  }

  // Adds the gradients of the distances of rows to their centres, passes those of means on to the rows, projects and
  // writes.
  void finish(const std::vector<A>& g, double per_distance, std::vector<A>& grad_rows, std::vector<A>& grad_bank,
              const MagnetTargets& targets) {
    each_group([&](std::int64_t group) {
      const std::int64_t begin = groups_.start[group], end = groups_.start[group + 1], at = center_index(group);
      std::vector<A> buffer(d_), row_buffer(d_), difference(d_);
      const A* mu = center(at, buffer.data());
      A* grad_mu = grad_bank.empty() ? nullptr : grad_bank.data() + at * d_;
      for (std::int64_t p = begin; p < end; ++p) {
        const std::int64_t i = groups_.rows[p];
        const A e = A(2 * (double(g[i]) * scale_ + per_distance));
        std::copy_n(row(i, row_buffer.data()), d_, difference.data());
        kernels_.axpy(difference.data(), A(-1), mu, d_);
        if (!grad_rows.empty()) kernels_.axpy(grad_rows.data() + i * d_, e, difference.data(), d_);
        if (grad_mu) kernels_.axpy(grad_mu, -e, difference.data(), d_);
      }
      if (given() || grad_rows.empty()) return;
      for (std::int64_t p = begin; p < end; ++p)
        kernels_.axpy(grad_rows.data() + groups_.rows[p] * d_, A(1) / A(end - begin), grad_mu, d_);
    });
    if (targets.x.data) write_rows(grad_rows, targets.x);
    if (targets.centers.data)
      write_values(grad_bank.data(), targets.centers.data, targets.centers.dtype, 0, bank_.rows * d_);
  }

  void write_rows(std::vector<A>& grad_rows, const Target& target) {
    torch::stable::parallel_for(0, n_, std::max<std::int64_t>(32768 / d_, 1),
                                [&](std::int64_t begin, std::int64_t end) {
                                  std::vector<A> buffer(d_);
                                  for (std::int64_t i = begin; i < end; ++i) {
                                    A* grad = grad_rows.data() + i * d_;
                                    if (args_.normalize) {
                                      kernels_.scale(grad, rows_.r[i], d_);
                                      rows_.finish(i, grad, A(0), buffer.data());
                                    }
                                    write_values(grad, target.data, target.dtype, i * d_, d_);
                                  }
                                });
  }

  const RowKernels<A>& kernels_ = row_kernels<A>();
  const MagnetArgs& args_;
  Groups groups_;
  std::int64_t n_, d_;
  Side<P> rows_;
  std::vector<A> unit_rows_, means_, distances_;  // distances_: squared, of each row to its centre
  std::vector<std::int64_t> y_, c_;
  Matrix bank_{};
  double measured_ = 0;  // the variance before its floor
  A scale_ = 0;
};

}  // namespace

template <class P>
void magnet_fwd(const MagnetArgs& args, const MagnetOut& out) {
  Magnet<P>(args).forward(out);
}

template <class P>
void magnet_bwd(const MagnetArgs& args, const Vector& grad, const Vector& different, const MagnetTargets& targets) {
  Magnet<P>(args).backward(grad, different, targets);
}

#define DML_INSTANTIATE(P)                                          \
  template void magnet_fwd<P>(const MagnetArgs&, const MagnetOut&); \
  template void magnet_bwd<P>(const MagnetArgs&, const Vector&, const Vector&, const MagnetTargets&);
DML_INSTANTIATE(float)
DML_INSTANTIATE(double)
DML_INSTANTIATE(bf16)
#undef DML_INSTANTIATE

}  // namespace dml::cpu
