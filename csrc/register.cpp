// The compiled ops, registered through libtorch's stable ABI as dml_kernels_cpu::*. The public ops, their fake kernels
// and autograd live in dml_kernels/ops.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "tensors.h"

namespace {

using namespace dml;
using namespace dml::cpu;

Tensor normalize_forward(Tensor x, double eps) {
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  normalize_fwd(matrix(x, "x"), eps, target_like(out, x, "out"));
  return out;
}

Tensor normalize_backward(Tensor grad, Tensor x, double eps) {
  const Source rows = matrix(x, "x"), incoming = matrix(grad, "grad");
  STD_TORCH_CHECK(incoming.rows == rows.rows && incoming.cols == rows.cols,
                  "dml_kernels: grad must have the shape of x");
  Tensor out = torch::stable::new_empty(x, {rows.rows, rows.cols});
  normalize_bwd(incoming, rows, eps, target_like(out, x, "out"));
  return out;
}

void distance_forward(Tensor out, Tensor x, Tensor w, std::int64_t metric, bool normalize, double eps) {
  const std::int64_t n = x.size(0), m = w.size(0);
  if (n == 0) return;
  STD_TORCH_CHECK(has_shape(out, {n, m}) && out.is_contiguous() && out.is_cpu(), "dml_kernels: out must be (", n, ", ",
                  m, ")");
  with_product_type(out.scalar_type(), [&](auto zero) {
    using P = decltype(zero);
    const Comparison<P> comparison = comparison_of<P>(x, w, metric, normalize, eps, Cut::bank);
    distance_fwd<P>(comparison, target(out, {n, m}, "out"));
  });
}

void distance_backward(Tensor grad_x, Tensor grad_w, Tensor grad, Tensor x, Tensor w, std::int64_t metric,
                       bool normalize, double eps) {
  const Source g = matrix(grad, "grad");
  STD_TORCH_CHECK(g.rows == x.size(0) && g.cols == w.size(0), "dml_kernels: grad must be (N, M)");
  with_product_type(grad.scalar_type(), [&](auto zero) {
    using P = decltype(zero);
    const Comparison<P> comparison = comparison_of<P>(x, w, metric, normalize, eps, Cut::bank);
    distance_bwd<P>(comparison, g, target_like(grad_x, x, "grad_x"), target_like(grad_w, w, "grad_w"));
  });
}

// The value check of labels and indices, before a kernel runs: one pass, no temporaries.
bool all_within(Tensor values, std::int64_t low, std::int64_t high, std::int64_t also) {
  STD_TORCH_CHECK(values.dim() == 1 && values.scalar_type() == ScalarType::Long, "dml_kernels: values must be int64");
  const std::int64_t* v = values.const_data_ptr<std::int64_t>();
  bool ok = true;
  for (std::int64_t i = 0, n = values.size(0), stride = values.stride(0); i < n; ++i, v += stride)
    ok &= (*v >= low && *v < high) || *v == also;
  return ok;
}

Policy policy(std::int64_t kind, std::int64_t centres, double number, const Tensor& w) {
  const Policy found{choice<Policy::Kind>(kind, 4, "policy"), centres, number};
  STD_TORCH_CHECK(centres >= 1 && w.size(0) % centres == 0 && (found.pools() || centres == 1),
                  "dml_kernels: w must have whole classes of ", centres, " centres");
  STD_TORCH_CHECK(found.kind != Policy::Kind::softmax_pool || number > 0, "dml_kernels: gamma must be positive");
  return found;
}

LogitArgs logit_args(std::int64_t n, std::int64_t m, double k_same, double o_same, double k_different,
                     double o_different, const OptionalTensor& scale, const OptionalTensor& col_bias,
                     const Policy& rule) {
  return {k_same, o_same, k_different, o_different, vector(scale, n, "scale"), vector(col_bias, m, "col_bias"), rule};
}

// `kind` is an empty tensor whose dtype is the products'.
std::tuple<Tensor, Tensor, Tensor, Tensor> mlse_forward(Tensor kind, Tensor x, Tensor w, Tensor y, OptionalTensor c,
                                                        OptionalTensor exclude, OptionalTensor scale,
                                                        OptionalTensor col_bias, std::int64_t metric, bool normalize,
                                                        double k_same, double o_same, double k_different,
                                                        double o_different, double eps, std::int64_t ignore_index,
                                                        std::int64_t kind_of_policy, std::int64_t centres,
                                                        double number, bool sums) {
  const Policy rule = policy(kind_of_policy, centres, number, w);
  const std::int64_t n = x.size(0), m = w.size(0) / centres;
  const ScalarType acc = accumulation(kind);
  const auto make = [&](std::int64_t size) { return torch::stable::new_empty(x, {size}, acc); };
  Tensor same = make(n), different = make(n), sum_same = make(sums ? n : 0), sum_different = make(sums ? n : 0);
  const Labels label = labels(n, m, y, c, exclude, ignore_index);
  const LogitArgs args = logit_args(n, m, k_same, o_same, k_different, o_different, scale, col_bias, rule);
  const LseOut out{same.mutable_data_ptr(), different.mutable_data_ptr(), sums ? sum_same.mutable_data_ptr() : nullptr,
                   sums ? sum_different.mutable_data_ptr() : nullptr};
  with_product_type(kind.scalar_type(), [&](auto zero) {
    using P = decltype(zero);
    const Comparison<P> comparison = comparison_of<P>(x, w, metric, normalize, eps, Cut::longer_side, centres);
    masked_logsumexp_fwd<P>(comparison, label, args, out);
  });
  return {same, different, sum_same, sum_different};
}

void mlse_backward(Tensor grad_x, Tensor grad_w, Tensor grad_scale, Tensor grad_col_bias, Tensor grad_same,
                   Tensor grad_different, Tensor grad_sum_same, Tensor grad_sum_different, Tensor same,
                   Tensor different, Tensor kind, Tensor x, Tensor w, Tensor y, OptionalTensor c,
                   OptionalTensor exclude, OptionalTensor scale, OptionalTensor col_bias, std::int64_t metric,
                   bool normalize, double k_same, double o_same, double k_different, double o_different, double eps,
                   std::int64_t ignore_index, std::int64_t kind_of_policy, std::int64_t centres, double number) {
  const Policy rule = policy(kind_of_policy, centres, number, w);
  const std::int64_t n = x.size(0), m = w.size(0) / centres;
  const Labels label = labels(n, m, y, c, exclude, ignore_index);
  const LogitArgs args = logit_args(n, m, k_same, o_same, k_different, o_different, scale, col_bias, rule);
  const auto optional = [n](const Tensor& t, const char* name) { return t.numel() ? vector(t, n, name) : Vector{}; };
  const LseIn in{vector(grad_same, n, "grad_same"),
                 vector(grad_different, n, "grad_different"),
                 optional(grad_sum_same, "grad_sum_same"),
                 optional(grad_sum_different, "grad_sum_different"),
                 vector(same, n, "same"),
                 vector(different, n, "different")};
  const LseTargets targets{target_like(grad_x, x, "grad_x"), target_like(grad_w, w, "grad_w"),
                           target(grad_scale, {n}, "grad_scale"), target(grad_col_bias, {m}, "grad_col_bias")};
  with_product_type(kind.scalar_type(), [&](auto zero) {
    using P = decltype(zero);
    const Comparison<P> comparison = comparison_of<P>(x, w, metric, normalize, eps, Cut::longer_side, centres);
    masked_logsumexp_bwd<P>(comparison, label, args, in, targets);
  });
}

ProxyArgs proxy_args(const Tensor& x, const Tensor& w, const Tensor& y, const OptionalTensor& scale,
                     const OptionalTensor& weight, double factor, bool exclude_positive, double label_smoothing,
                     double eps, std::int64_t ignore_index, std::int64_t reduction) {
  const std::int64_t n = x.size(0);
  const Source rows = matrix(x, "x"), proxies = matrix(w, "w");
  STD_TORCH_CHECK(rows.cols == proxies.cols && rows.cols > 0 && proxies.rows > 0,
                  "dml_kernels: x and w must have the same embedding size, and w at least one row");
  return {rows,
          proxies,
          integers(y, n, "y"),
          ignore_index,
          vector(scale, n, "scale"),
          vector(weight, n, "weight"),
          factor,
          label_smoothing,
          eps,
          exclude_positive,
          choice<Reduction>(reduction, 3, "reduction")};
}

std::tuple<Tensor, Tensor, Tensor> proxy_nca_forward(Tensor kind, Tensor x, Tensor w, Tensor y, OptionalTensor scale,
                                                     OptionalTensor weight, double factor, bool exclude_positive,
                                                     double label_smoothing, double eps, std::int64_t ignore_index,
                                                     std::int64_t reduction) {
  const std::int64_t n = x.size(0);
  const ScalarType acc = accumulation(kind);
  Tensor value = reduction ? torch::stable::new_empty(x, {}, acc) : torch::stable::new_empty(x, {n}, acc);
  Tensor same = torch::stable::new_empty(x, {n}, acc), different = torch::stable::new_empty(x, {n}, acc);
  const ProxyArgs args =
      proxy_args(x, w, y, scale, weight, factor, exclude_positive, label_smoothing, eps, ignore_index, reduction);
  const ProxyOut out{value.mutable_data_ptr(), same.mutable_data_ptr(), different.mutable_data_ptr()};
  with_product_type(kind.scalar_type(), [&](auto zero) { proxy_nca_fwd<decltype(zero)>(args, out); });
  return {value, same, different};
}

void proxy_nca_backward(Tensor grad_x, Tensor grad_w, Tensor grad_scale, Tensor grad, Tensor same, Tensor different,
                        Tensor kind, Tensor x, Tensor w, Tensor y, OptionalTensor scale, OptionalTensor weight,
                        double factor, bool exclude_positive, double label_smoothing, double eps,
                        std::int64_t ignore_index, std::int64_t reduction) {
  const std::int64_t n = x.size(0);
  const ProxyArgs args =
      proxy_args(x, w, y, scale, weight, factor, exclude_positive, label_smoothing, eps, ignore_index, reduction);
  const ProxyTargets targets{target_like(grad_x, x, "grad_x"), target_like(grad_w, w, "grad_w"),
                             target(grad_scale, {n}, "grad_scale")};
  const Vector incoming = vector(grad, n, "grad"), lse_same = vector(same, n, "same"),
               lse_different = vector(different, n, "different");
  with_product_type(kind.scalar_type(), [&](auto zero) {
    proxy_nca_bwd<decltype(zero)>(args, incoming, lse_same, lse_different, targets);
  });
}

MagnetArgs magnet_args(const Tensor& x, const Tensor& clusters, const Tensor& classes, const OptionalTensor& centers,
                       const OptionalTensor& variance, double alpha, bool normalize, double min_variance, double eps,
                       std::int64_t ignore_index, std::int64_t reduction) {
  const Source rows = matrix(x, "x"), bank = centers ? matrix(*centers, "centers") : Source{};
  STD_TORCH_CHECK(!centers || (bank.rows == classes.size(0) && bank.cols == rows.cols),
                  "dml_kernels: a centre for each cluster, as wide as x");
  return {rows,
          bank,
          integers(clusters, x.size(0), "clusters"),
          integers(classes, classes.size(0), "classes"),
          classes.size(0),
          ignore_index,
          variance ? vector(*variance, 1, "variance") : Vector{},
          alpha,
          min_variance,
          eps,
          normalize,
          choice<Reduction>(reduction, 3, "reduction")};
}

std::tuple<Tensor, Tensor, Tensor> magnet_forward(Tensor kind, Tensor x, Tensor clusters, Tensor classes,
                                                  OptionalTensor centers, OptionalTensor variance, double alpha,
                                                  bool normalize, double min_variance, double eps,
                                                  std::int64_t ignore_index, std::int64_t reduction) {
  const std::int64_t n = x.size(0);
  const ScalarType acc = accumulation(kind);
  Tensor value = reduction ? torch::stable::new_empty(x, {}, acc) : torch::stable::new_empty(x, {n}, acc);
  Tensor different = torch::stable::new_empty(x, {n}, acc), measured = torch::stable::new_empty(x, {}, acc);
  const MagnetArgs args = magnet_args(x, clusters, classes, centers, variance, alpha, normalize, min_variance, eps,
                                      ignore_index, reduction);
  const MagnetOut out{value.mutable_data_ptr(), different.mutable_data_ptr(), measured.mutable_data_ptr()};
  with_product_type(kind.scalar_type(), [&](auto zero) { magnet_fwd<decltype(zero)>(args, out); });
  return {value, different, measured};
}

void magnet_backward(Tensor grad_x, Tensor grad_centers, Tensor grad_variance, Tensor grad, Tensor different,
                     Tensor kind, Tensor x, Tensor clusters, Tensor classes, OptionalTensor centers,
                     OptionalTensor variance, double alpha, bool normalize, double min_variance, double eps,
                     std::int64_t ignore_index, std::int64_t reduction) {
  const std::int64_t n = x.size(0);
  const MagnetArgs args = magnet_args(x, clusters, classes, centers, variance, alpha, normalize, min_variance, eps,
                                      ignore_index, reduction);
  const MagnetTargets targets{
      target_like(grad_x, x, "grad_x"),
      centers ? target_like(grad_centers, *centers, "grad_centers") : target(grad_centers, {0}, "grad_centers"),
      target(grad_variance, {}, "grad_variance")};
  const Vector incoming = vector(grad, n, "grad"), lse = vector(different, n, "different");
  with_product_type(kind.scalar_type(), [&](auto zero) { magnet_bwd<decltype(zero)>(args, incoming, lse, targets); });
}

}  // namespace

STABLE_TORCH_LIBRARY(dml_kernels_cpu, m) {
  m.def("all_within(Tensor values, int low, int high, int also) -> bool");
  m.def("normalize_fwd(Tensor x, float eps) -> Tensor");
  m.def("normalize_bwd(Tensor grad, Tensor x, float eps) -> Tensor");
  m.def("distance_fwd(Tensor(a!) out, Tensor x, Tensor w, int metric, bool normalize, float eps) -> ()");
  m.def(
      "distance_bwd(Tensor(a!) grad_x, Tensor(b!) grad_w, Tensor grad, Tensor x, Tensor w, int metric, bool normalize, "
      "float eps) -> ()");
  m.def(
      "mlse_fwd(Tensor kind, Tensor x, Tensor w, Tensor y, Tensor? c, Tensor? exclude, Tensor? scale, "
      "Tensor? col_bias, int metric, bool normalize, float k_same, float o_same, float k_different, "
      "float o_different, float eps, int ignore_index, int policy, int centres, float number, bool sums) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "mlse_bwd(Tensor(a!) grad_x, Tensor(b!) grad_w, Tensor(c!) grad_scale, Tensor(d!) grad_col_bias, "
      "Tensor grad_same, Tensor grad_different, Tensor grad_sum_same, Tensor grad_sum_different, "
      "Tensor same, Tensor different, Tensor kind, Tensor x, Tensor w, Tensor y, Tensor? c, Tensor? exclude, "
      "Tensor? scale, Tensor? col_bias, int metric, bool normalize, float k_same, float o_same, float k_different, "
      "float o_different, float eps, int ignore_index, int policy, "
      "int centres, float number) -> ()");
  m.def(
      "proxy_nca_fwd(Tensor kind, Tensor x, Tensor w, Tensor y, Tensor? scale, Tensor? weight, float factor, "
      "bool exclude_positive, float label_smoothing, float eps, int ignore_index, int reduction) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "proxy_nca_bwd(Tensor(a!) grad_x, Tensor(b!) grad_w, Tensor(c!) grad_scale, Tensor grad, Tensor same, "
      "Tensor different, Tensor kind, Tensor x, Tensor w, Tensor y, Tensor? scale, Tensor? weight, float factor, "
      "bool exclude_positive, float label_smoothing, float eps, int ignore_index, int reduction) -> ()");
  m.def(
      "magnet_fwd(Tensor kind, Tensor x, Tensor clusters, Tensor classes, Tensor? centers, Tensor? variance, "
      "float alpha, bool normalize, float min_variance, float eps, int ignore_index, int reduction) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "magnet_bwd(Tensor(a!) grad_x, Tensor(b!) grad_centers, Tensor(c!) grad_variance, Tensor grad, Tensor different, "
      "Tensor kind, Tensor x, Tensor clusters, Tensor classes, Tensor? centers, Tensor? variance, float alpha, "
      "bool normalize, float min_variance, float eps, int ignore_index, int reduction) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dml_kernels_cpu, CPU, m) {
  m.impl("all_within", TORCH_BOX(&all_within));
  m.impl("normalize_fwd", TORCH_BOX(&normalize_forward));
  m.impl("normalize_bwd", TORCH_BOX(&normalize_backward));
  m.impl("distance_fwd", TORCH_BOX(&distance_forward));
  m.impl("distance_bwd", TORCH_BOX(&distance_backward));
  m.impl("mlse_fwd", TORCH_BOX(&mlse_forward));
  m.impl("mlse_bwd", TORCH_BOX(&mlse_backward));
  m.impl("proxy_nca_fwd", TORCH_BOX(&proxy_nca_forward));
  m.impl("proxy_nca_bwd", TORCH_BOX(&proxy_nca_backward));
  m.impl("magnet_fwd", TORCH_BOX(&magnet_forward));
  m.impl("magnet_bwd", TORCH_BOX(&magnet_backward));
}
