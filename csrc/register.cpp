// The ops of the CPU, registered through libtorch's stable ABI as dml_kernels_cpu::*. The public ops, their fake
// kernels and their derivatives are in dml_kernels/ops.
#include <tuple>

#include "register_cpu.h"

namespace {

using namespace dml;
using namespace dml::cpu;

Tensor normalize_forward(Tensor x, double eps) {
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  normalize_fwd(Checked::matrix(x, "x"), eps, Checked::target_like(out, x, "out"));
  return out;
}

Tensor normalize_backward(Tensor grad, Tensor x, double eps) {
  const Matrix rows = Checked::matrix(x, "x"), incoming = Checked::matrix(grad, "grad");
  STD_TORCH_CHECK(incoming.rows == rows.rows && incoming.cols == rows.cols,
                  "dml_kernels: grad must have the shape of x");
  Tensor out = torch::stable::new_empty(x, {rows.rows, rows.cols});
  normalize_bwd(incoming, rows, eps, Checked::target_like(out, x, "out"));
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
    distance_fwd<P>(comparison, Checked::target(out, {n, m}, "out"));
  });
}

void distance_backward(Tensor grad_x, Tensor grad_w, Tensor grad, Tensor x, Tensor w, std::int64_t metric,
                       bool normalize, double eps) {
  const Matrix g = Checked::matrix(grad, "grad");
  STD_TORCH_CHECK(g.rows == x.size(0) && g.cols == w.size(0), "dml_kernels: grad must be (N, M)");
  with_product_type(grad.scalar_type(), [&](auto zero) {
    using P = decltype(zero);
    const Comparison<P> comparison = comparison_of<P>(x, w, metric, normalize, eps, Cut::bank);
    distance_bwd<P>(comparison, g, Checked::target_like(grad_x, x, "grad_x"),
                    Checked::target_like(grad_w, w, "grad_w"));
  });
}

// Checks the values of labels and indices before a kernel runs, in one pass and without temporaries.
bool all_within(Tensor values, std::int64_t low, std::int64_t high, std::int64_t also) {
  STD_TORCH_CHECK(values.dim() == 1 && values.scalar_type() == ScalarType::Long, "dml_kernels: values must be int64");
  const std::int64_t* v = values.const_data_ptr<std::int64_t>();
  bool ok = true;
  for (std::int64_t i = 0, n = values.size(0), stride = values.stride(0); i < n; ++i, v += stride)
    ok &= (*v >= low && *v < high) || *v == also;
  return ok;
}

Policy policy(Stack& stack, const Tensor& w) {
  const auto kind = choice<Policy::Kind>(stack.integer(), 4, "policy");
  const Policy found{kind, stack.integer(), stack.number()};
  STD_TORCH_CHECK(found.centres >= 1 && w.size(0) % found.centres == 0 && (found.pools() || found.centres == 1),
                  "dml_kernels: w must have whole classes of ", found.centres, " centres");
  STD_TORCH_CHECK(found.kind != Policy::Kind::softmax_pool || found.number > 0, "dml_kernels: gamma must be positive");
  return found;
}

template <class P>
Comparison<P> comparison_of(const LogitCall& call, const Policy& rule) {
  return comparison_of<P>(call.x, call.w, call.metric, call.normalize, call.eps, Cut::longer_side, rule.centres);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mlse_forward(Stack& stack) {
  const Tensor kind = stack.tensor();
  const LogitCall call = stack.logit_call();
  const Policy rule = policy(stack, call.w);
  const std::int64_t first_class = stack.integer();
  const bool sums = stack.flag();
  stack.end();
  const std::int64_t n = call.x.size(0), columns = call.w.size(0) / rule.centres;
  const ScalarType acc = accumulation(kind);
  const auto make = [&](std::int64_t size) { return torch::stable::new_empty(call.x, {size}, acc); };
  Tensor same = make(n), different = make(n), sum_same = make(sums ? n : 0), sum_different = make(sums ? n : 0);
  const Labels labels = Checked::labels(n, columns, call.y, call.c, call.exclude, call.ignore_index, first_class);
  const PolicyLogitArgs args{Checked::logit_args(call, columns), rule};
  const LseOut out{same.mutable_data_ptr(), different.mutable_data_ptr(), sums ? sum_same.mutable_data_ptr() : nullptr,
                   sums ? sum_different.mutable_data_ptr() : nullptr};
  with_product_type(kind.scalar_type(), [&](auto zero) {
    masked_logsumexp_fwd(comparison_of<decltype(zero)>(call, rule), labels, args, out);
  });
  return {same, different, sum_same, sum_different};
}

void mlse_backward(Stack& stack) {
  const LseTensors tensors = stack.lse_tensors();
  const Tensor kind = stack.tensor();
  const LogitCall call = stack.logit_call();
  const Policy rule = policy(stack, call.w);
  const std::int64_t first_class = stack.integer();
  stack.end();
  const std::int64_t n = call.x.size(0), columns = call.w.size(0) / rule.centres;
  const Labels labels = Checked::labels(n, columns, call.y, call.c, call.exclude, call.ignore_index, first_class);
  const PolicyLogitArgs args{Checked::logit_args(call, columns), rule};
  const LseGrads grads = Checked::lse_grads(tensors, n);
  const LseTargets targets = Checked::lse_targets(tensors, call, columns);
  with_product_type(kind.scalar_type(), [&](auto zero) {
    masked_logsumexp_bwd(comparison_of<decltype(zero)>(call, rule), labels, args, grads, targets);
  });
}

ProxyArgs proxy_args(const ProxyCall& call, std::int64_t first_class) {
  const std::int64_t n = call.x.size(0);
  const Matrix rows = Checked::matrix(call.x, "x"), proxies = Checked::matrix(call.w, "w");
  STD_TORCH_CHECK(rows.cols == proxies.cols && rows.cols > 0 && proxies.rows > 0,
                  "dml_kernels: x and w must have the same embedding size, and w at least one row");
  Checked::check_first_class(first_class, proxies.rows);
  return {rows,
          proxies,
          Checked::integers(call.y, n, "y"),
          call.ignore_index,
          first_class,
          Checked::vector(call.scale, n, "scale"),
          Checked::vector(call.weight, n, "weight"),
          call.factor,
          call.label_smoothing,
          call.eps,
          call.exclude_positive,
          choice<Reduction>(call.reduction, 3, "reduction")};
}

std::tuple<Tensor, Tensor, Tensor> proxy_nca_forward(Stack& stack) {
  const Tensor kind = stack.tensor();
  const ProxyCall call = stack.proxy_call();
  const std::int64_t first_class = stack.integer();
  stack.end();
  const std::int64_t n = call.x.size(0);
  const auto make = [&](std::initializer_list<std::int64_t> shape) {
    return torch::stable::new_empty(call.x, shape, accumulation(kind));
  };
  Tensor value = call.reduction ? make({}) : make({n}), same = make({n}), different = make({n});
  const ProxyArgs args = proxy_args(call, first_class);
  const ProxyOut out{value.mutable_data_ptr(), same.mutable_data_ptr(), different.mutable_data_ptr()};
  with_product_type(kind.scalar_type(), [&](auto zero) { proxy_nca_fwd<decltype(zero)>(args, out); });
  return {value, same, different};
}

void proxy_nca_backward(Stack& stack) {
  const Tensor grad_x = stack.tensor(), grad_w = stack.tensor(), grad_scale = stack.tensor(), grad = stack.tensor(),
               same = stack.tensor(), different = stack.tensor(), kind = stack.tensor();
  const ProxyCall call = stack.proxy_call();
  const std::int64_t first_class = stack.integer();
  stack.end();
  const std::int64_t n = call.x.size(0);
  const ProxyArgs args = proxy_args(call, first_class);
  const ProxyTargets targets{Checked::target_like(grad_x, call.x, "grad_x"),
                             Checked::target_like(grad_w, call.w, "grad_w"),
                             Checked::target(grad_scale, {n}, "grad_scale")};
  const Vector incoming = Checked::vector(grad, n, "grad"), lse_same = Checked::vector(same, n, "same"),
               lse_different = Checked::vector(different, n, "different");
  with_product_type(kind.scalar_type(), [&](auto zero) {
    proxy_nca_bwd<decltype(zero)>(args, incoming, lse_same, lse_different, targets);
  });
}

std::tuple<Tensor, Tensor, Tensor> magnet_forward(Stack& stack) {
  const Tensor kind = stack.tensor();
  const MagnetCall call = stack.magnet_call();
  stack.end();
  const std::int64_t n = call.x.size(0);
  const auto make = [&](std::initializer_list<std::int64_t> shape) {
    return torch::stable::new_empty(call.x, shape, accumulation(kind));
  };
  Tensor value = call.reduction ? make({}) : make({n}), different = make({n}), measured = make({});
  const MagnetArgs args = Checked::magnet_args(call);
  const MagnetOut out{value.mutable_data_ptr(), different.mutable_data_ptr(), measured.mutable_data_ptr()};
  with_product_type(kind.scalar_type(), [&](auto zero) { magnet_fwd<decltype(zero)>(args, out); });
  return {value, different, measured};
}

void magnet_backward(Stack& stack) {
  const Tensor grad_x = stack.tensor(), grad_centers = stack.tensor(), grad_variance = stack.tensor(),
               grad = stack.tensor(), different = stack.tensor(), kind = stack.tensor();
  const MagnetCall call = stack.magnet_call();
  stack.end();
  const std::int64_t n = call.x.size(0);
  const MagnetArgs args = Checked::magnet_args(call);
  const MagnetTargets targets = Checked::magnet_targets(grad_x, grad_centers, grad_variance, call);
  const Vector incoming = Checked::vector(grad, n, "grad"), lse = Checked::vector(different, n, "different");
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
      "float o_different, float eps, int ignore_index, int policy, int centres, float number, int first_class, "
      "bool sums) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "mlse_bwd(Tensor(a!) grad_x, Tensor(b!) grad_w, Tensor(c!) grad_scale, Tensor(d!) grad_col_bias, "
      "Tensor grad_same, Tensor grad_different, Tensor grad_sum_same, Tensor grad_sum_different, "
      "Tensor same, Tensor different, Tensor kind, Tensor x, Tensor w, Tensor y, Tensor? c, Tensor? exclude, "
      "Tensor? scale, Tensor? col_bias, int metric, bool normalize, float k_same, float o_same, float k_different, "
      "float o_different, float eps, int ignore_index, int policy, "
      "int centres, float number, int first_class) -> ()");
  m.def(
      "proxy_nca_fwd(Tensor kind, Tensor x, Tensor w, Tensor y, Tensor? scale, Tensor? weight, float factor, "
      "bool exclude_positive, float label_smoothing, float eps, int ignore_index, int reduction, "
      "int first_class) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "proxy_nca_bwd(Tensor(a!) grad_x, Tensor(b!) grad_w, Tensor(c!) grad_scale, Tensor grad, Tensor same, "
      "Tensor different, Tensor kind, Tensor x, Tensor w, Tensor y, Tensor? scale, Tensor? weight, float factor, "
      "bool exclude_positive, float label_smoothing, float eps, int ignore_index, int reduction, "
      "int first_class) -> ()");
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
  m.impl("mlse_fwd", boxed<mlse_forward>);
  m.impl("mlse_bwd", boxed<mlse_backward>);
  m.impl("proxy_nca_fwd", boxed<proxy_nca_forward>);
  m.impl("proxy_nca_bwd", boxed<proxy_nca_backward>);
  m.impl("magnet_fwd", boxed<magnet_forward>);
  m.impl("magnet_bwd", boxed<magnet_backward>);
}
