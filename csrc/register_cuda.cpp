// The CUDA ops, registered through libtorch's stable ABI as dml_kernels_cuda::*. Their schemas are those of
// register.cpp without `kind` and without a logit policy. The extension contains them only if it is built with CUDA;
// the tests compile the same code for CPU tensors, with their emulator.
#if defined(DML_WITH_CUDA) || defined(DML_CUDA_EMULATOR)
#include "register_cuda.h"

#include <tuple>

namespace {

using namespace dml;
using namespace dml::cuda;

Tensor normalize_fwd(Tensor x, double eps) {
  const Launch launch(x);
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  check(normalize_forward(Checked::matrix(x, "x"), eps, {out.mutable_data_ptr(), dtype_of(x, "x")}, launch.stream),
        "normalize");
  return out;
}

Tensor normalize_bwd(Tensor grad, Tensor x, double eps) {
  const Launch launch(x);
  const Matrix g = Checked::matrix(grad, "grad"), rows = Checked::matrix(x, "x");
  STD_TORCH_CHECK(g.rows == rows.rows && g.cols == rows.cols, "dml_kernels: grad must have the shape of x");
  STD_TORCH_CHECK((g.dtype == Dtype::f64) == (rows.dtype == Dtype::f64), "dml_kernels: fp64 with another dtype");
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  check(normalize_backward(g, rows, eps, {out.mutable_data_ptr(), rows.dtype}, launch.stream), "normalize");
  return out;
}

void distance_fwd(Tensor out, Tensor x, Tensor w, std::int64_t metric, bool normalize, double eps) {
  if (x.size(0) == 0) return;
  const Launch launch(x);
  const Target to = Checked::target(out, {x.size(0), w.size(0)}, "out");
  check(distance_forward(comparison_of(x, w, metric, normalize, eps), to, launch.stream), "normalized_distance");
}

void distance_bwd(Tensor grad_x, Tensor grad_w, Tensor grad, Tensor x, Tensor w, std::int64_t metric, bool normalize,
                  double eps) {
  const Launch launch(x);
  const Comparison comparison = comparison_of(x, w, metric, normalize, eps);
  const Matrix g = Checked::matrix(grad, "grad");
  STD_TORCH_CHECK(g.rows == comparison.x.rows && g.cols == comparison.w.rows, "dml_kernels: grad must be (N, M)");
  STD_TORCH_CHECK((g.dtype == Dtype::f64) == comparison.wide, "dml_kernels: fp64 with another dtype");
  const Scratch scratch(x, backward_bytes(comparison));
  check(distance_backward(comparison, g, Checked::target_like(grad_x, x, "grad_x"),
                          Checked::target_like(grad_w, w, "grad_w"), scratch.data(), launch.stream),
        "normalized_distance");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mlse_fwd(Stack& stack) {
  const LogitCall call = stack.logit_call();
  const bool with_sums = stack.flag();
  stack.end();
  const Launch launch(call.x);
  const std::int64_t n = call.x.size(0), m = call.w.size(0);
  const Comparison comparison = comparison_of(call.x, call.w, call.metric, call.normalize, call.eps);
  const auto make = [&](std::int64_t size) {
    return torch::stable::new_empty(call.x, {size}, accumulation(comparison.wide));
  };
  Tensor same = make(n), different = make(n), sum_same = make(with_sums ? n : 0),
         sum_different = make(with_sums ? n : 0);
  if (n == 0) return {same, different, sum_same, sum_different};
  const Labels labels = Checked::labels(n, m, call.y, call.c, call.exclude, call.ignore_index);
  const LseOut out{same.mutable_data_ptr(), different.mutable_data_ptr(),
                   with_sums ? sum_same.mutable_data_ptr() : nullptr,
                   with_sums ? sum_different.mutable_data_ptr() : nullptr};
  const Scratch scratch(call.x, lse_forward_bytes(n, m));
  check(lse_forward(comparison, labels, Checked::logit_args(call, m), out, {}, scratch.data(), launch.stream),
        "masked_logsumexp");
  return {same, different, sum_same, sum_different};
}

void mlse_bwd(Stack& stack) {
  const LseTensors tensors = stack.lse_tensors();
  const LogitCall call = stack.logit_call();
  stack.end();
  const Launch launch(call.x);
  const std::int64_t n = call.x.size(0), m = call.w.size(0);
  const Comparison comparison = comparison_of(call.x, call.w, call.metric, call.normalize, call.eps);
  const Labels labels = Checked::labels(n, m, call.y, call.c, call.exclude, call.ignore_index);
  LseGrads grads = Checked::lse_grads(tensors, n);
  grads.lse_same = Checked::result(tensors.same, n, comparison.wide, "same");
  grads.lse_different = Checked::result(tensors.different, n, comparison.wide, "different");
  const LseTargets targets = Checked::lse_targets(tensors, call, m);
  const Scratch scratch(call.x, backward_bytes(comparison));
  check(
      lse_backward(comparison, labels, Checked::logit_args(call, m), grads, targets, {}, scratch.data(), launch.stream),
      "masked_logsumexp");
}

constexpr std::int64_t squared = std::int64_t(Metric::sqeuclidean);

ProxyNca proxy_nca(const ProxyCall& call, void* value) {
  return {true,
          call.exclude_positive,
          call.label_smoothing,
          Checked::vector(call.weight, call.x.size(0), "weight"),
          choice<Reduction>(call.reduction, 3, "reduction"),
          value};
}

LogitArgs logit_args(const ProxyCall& call) {
  return {call.factor, 0, call.factor, 0, Checked::vector(call.scale, call.x.size(0), "scale"), {}};
}

Labels labels(const ProxyCall& call) {
  return {Checked::integers(call.y, call.x.size(0), "y"), nullptr, nullptr, call.ignore_index};
}

std::tuple<Tensor, Tensor, Tensor> proxy_nca_fwd(Stack& stack) {
  const ProxyCall call = stack.proxy_call();
  stack.end();
  const Launch launch(call.x);
  const std::int64_t n = call.x.size(0), m = call.w.size(0);
  STD_TORCH_CHECK(n > 0, "dml_kernels: proxy_nca needs at least one row");
  const Comparison comparison = comparison_of(call.x, call.w, squared, true, call.eps);
  const ScalarType type = accumulation(comparison.wide);
  const auto make = [&](std::int64_t size) { return torch::stable::new_empty(call.x, {size}, type); };
  const bool smooth = call.label_smoothing > 0;
  Tensor same = make(n), different = make(n), sum_same = make(smooth ? n : 0), sum_different = make(smooth ? n : 0);
  Tensor value = call.reduction ? torch::stable::new_empty(call.x, {}, type) : make(n);
  const LseOut out{same.mutable_data_ptr(), different.mutable_data_ptr(),
                   smooth ? sum_same.mutable_data_ptr() : nullptr, smooth ? sum_different.mutable_data_ptr() : nullptr};
  const Scratch scratch(call.x, lse_forward_bytes(n, m));
  check(lse_forward(comparison, labels(call), logit_args(call), out, proxy_nca(call, value.mutable_data_ptr()),
                    scratch.data(), launch.stream),
        "proxy_nca");
  return {value, same, different};
}

void proxy_nca_bwd(Stack& stack) {
  const Tensor grad_x = stack.tensor(), grad_w = stack.tensor(), grad_scale = stack.tensor(), grad = stack.tensor(),
               same = stack.tensor(), different = stack.tensor();
  const ProxyCall call = stack.proxy_call();
  stack.end();
  const Launch launch(call.x);
  const std::int64_t n = call.x.size(0);
  const Comparison comparison = comparison_of(call.x, call.w, squared, true, call.eps);
  const LseGrads grads{Checked::vector(grad, n, "grad"),
                       {},
                       {},
                       {},
                       Checked::result(same, n, comparison.wide, "same"),
                       Checked::result(different, n, comparison.wide, "different")};
  const LseTargets targets{Checked::target_like(grad_x, call.x, "grad_x"),
                           Checked::target_like(grad_w, call.w, "grad_w"),
                           Checked::target(grad_scale, {n}, "grad_scale"),
                           {}};
  const Scratch scratch(call.x, backward_bytes(comparison));
  check(lse_backward(comparison, labels(call), logit_args(call), grads, targets, proxy_nca(call, nullptr),
                     scratch.data(), launch.stream),
        "proxy_nca");
}

bool magnet_fits(Tensor x, std::int64_t clusters, bool given_centers) {
  return !magnet_refusal(x.size(0), clusters, given_centers, x.scalar_type() == ScalarType::Double);
}

MagnetArgs magnet_args(const MagnetCall& call) {
  MagnetArgs args = Checked::magnet_args(call);
  args.x = widened(args.x, wide(args)), args.centers = widened(args.centers, wide(args));
  check(magnet_refusal(args.x.rows, args.cluster_count, call.centers.has_value(), wide(args)), "magnet_loss");
  return args;
}

std::tuple<Tensor, Tensor, Tensor> magnet_fwd(Stack& stack) {
  const MagnetCall call = stack.magnet_call();
  stack.end();
  const Launch launch(call.x);
  const std::int64_t n = call.x.size(0);
  const MagnetArgs args = magnet_args(call);
  const auto make = [&](std::initializer_list<std::int64_t> shape) {
    return torch::stable::new_empty(call.x, shape, accumulation(wide(args)));
  };
  Tensor value = call.reduction ? make({}) : make({n}), different = make({n}), measured = make({});
  const Scratch scratch(call.x, magnet_forward_bytes(args));
  check(magnet_forward(args, {value.mutable_data_ptr(), different.mutable_data_ptr(), measured.mutable_data_ptr()},
                       scratch.data(), launch.stream),
        "magnet_loss");
  return {value, different, measured};
}

void magnet_bwd(Stack& stack) {
  const Tensor grad_x = stack.tensor(), grad_centers = stack.tensor(), grad_variance = stack.tensor(),
               grad = stack.tensor(), different = stack.tensor();
  const MagnetCall call = stack.magnet_call();
  stack.end();
  const Launch launch(call.x);
  const std::int64_t n = call.x.size(0);
  const MagnetArgs args = magnet_args(call);
  const MagnetTargets targets = Checked::magnet_targets(grad_x, grad_centers, grad_variance, call);
  const Scratch scratch(call.x, magnet_backward_bytes(args));
  const Vector lse = Checked::result(different, n, wide(args), "different");
  check(magnet_backward(args, Checked::vector(grad, n, "grad"), lse.data, targets, scratch.data(), launch.stream),
        "magnet_loss");
}

template <class Library>
void define(Library& m) {
  m.def("normalize_fwd(Tensor x, float eps) -> Tensor");
  m.def("normalize_bwd(Tensor grad, Tensor x, float eps) -> Tensor");
  m.def("distance_fwd(Tensor(a!) out, Tensor x, Tensor w, int metric, bool normalize, float eps) -> ()");
  m.def(
      "distance_bwd(Tensor(a!) grad_x, Tensor(b!) grad_w, Tensor grad, Tensor x, Tensor w, int metric, bool normalize, "
      "float eps) -> ()");
  m.def(
      "mlse_fwd(Tensor x, Tensor w, Tensor y, Tensor? c, Tensor? exclude, Tensor? scale, "
      "Tensor? col_bias, int metric, bool normalize, float k_same, float o_same, float k_different, "
      "float o_different, float eps, int ignore_index, bool sums) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "mlse_bwd(Tensor(a!) grad_x, Tensor(b!) grad_w, Tensor(c!) grad_scale, Tensor(d!) grad_col_bias, "
      "Tensor grad_same, Tensor grad_different, Tensor grad_sum_same, Tensor grad_sum_different, "
      "Tensor same, Tensor different, Tensor x, Tensor w, Tensor y, Tensor? c, Tensor? exclude, "
      "Tensor? scale, Tensor? col_bias, int metric, bool normalize, float k_same, float o_same, float k_different, "
      "float o_different, float eps, int ignore_index) -> ()");
  m.def(
      "proxy_nca_fwd(Tensor x, Tensor w, Tensor y, Tensor? scale, Tensor? weight, float factor, "
      "bool exclude_positive, float label_smoothing, float eps, int ignore_index, int reduction) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "proxy_nca_bwd(Tensor(a!) grad_x, Tensor(b!) grad_w, Tensor(c!) grad_scale, Tensor grad, Tensor same, "
      "Tensor different, Tensor x, Tensor w, Tensor y, Tensor? scale, Tensor? weight, float factor, "
      "bool exclude_positive, float label_smoothing, float eps, int ignore_index, int reduction) -> ()");
  m.def("magnet_fits(Tensor x, int clusters, bool given_centers) -> bool");
  m.def(
      "magnet_fwd(Tensor x, Tensor clusters, Tensor classes, Tensor? centers, Tensor? variance, float alpha, "
      "bool normalize, float min_variance, float eps, int ignore_index, int reduction) -> (Tensor, Tensor, Tensor)");
  m.def(
      "magnet_bwd(Tensor(a!) grad_x, Tensor(b!) grad_centers, Tensor(c!) grad_variance, Tensor grad, Tensor different, "
      "Tensor x, Tensor clusters, Tensor classes, Tensor? centers, Tensor? variance, float alpha, bool normalize, "
      "float min_variance, float eps, int ignore_index, int reduction) -> ()");
}

template <class Library>
void implement(Library& m) {
  m.impl("normalize_fwd", TORCH_BOX(&normalize_fwd));
  m.impl("normalize_bwd", TORCH_BOX(&normalize_bwd));
  m.impl("distance_fwd", TORCH_BOX(&distance_fwd));
  m.impl("distance_bwd", TORCH_BOX(&distance_bwd));
  m.impl("mlse_fwd", boxed<mlse_fwd>);
  m.impl("mlse_bwd", boxed<mlse_bwd>);
  m.impl("proxy_nca_fwd", boxed<proxy_nca_fwd>);
  m.impl("proxy_nca_bwd", boxed<proxy_nca_bwd>);
  m.impl("magnet_fits", TORCH_BOX(&magnet_fits));
  m.impl("magnet_fwd", boxed<magnet_fwd>);
  m.impl("magnet_bwd", boxed<magnet_bwd>);
}

}  // namespace

#ifdef DML_CUDA_EMULATOR
STABLE_TORCH_LIBRARY(dml_kernels_cuda_emulated, m) { define(m); }
STABLE_TORCH_LIBRARY_IMPL(dml_kernels_cuda_emulated, CPU, m) { implement(m); }
#else
STABLE_TORCH_LIBRARY(dml_kernels_cuda, m) { define(m); }
STABLE_TORCH_LIBRARY_IMPL(dml_kernels_cuda, CUDA, m) { implement(m); }
#endif
#endif
