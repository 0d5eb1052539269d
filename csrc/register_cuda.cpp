// The CUDA ops, registered through libtorch's stable ABI as dml_kernels_cuda::*, with the schemas of dml_kernels_cpu::*
// (register.cpp) and the fused Proxy-NCA. Compiled into the extension only with CUDA; under the tests' emulator the same
// code serves CPU tensors.
#if defined(DML_WITH_CUDA) || defined(DML_CUDA_EMULATOR)
#include "register_cuda.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace {

using namespace dml;
using namespace dml::cuda;

Tensor normalize_fwd(Tensor x, double eps) {
  const Launch launch(x);
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  check(normalize_forward(matrix(x, "x"), eps, {out.mutable_data_ptr(), dtype_of(x, "x")}, launch.stream), "normalize");
  return out;
}

Tensor normalize_bwd(Tensor grad, Tensor x, double eps) {
  const Launch launch(x);
  const Matrix g = matrix(grad, "grad"), rows = matrix(x, "x");
  STD_TORCH_CHECK(g.rows == rows.rows && g.cols == rows.cols, "dml_kernels: grad must have the shape of x");
  STD_TORCH_CHECK((g.dtype == Dtype::f64) == (rows.dtype == Dtype::f64), "dml_kernels: fp64 with another dtype");
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  check(normalize_backward(g, rows, eps, {out.mutable_data_ptr(), rows.dtype}, launch.stream), "normalize");
  return out;
}

void distance_fwd(Tensor out, Tensor x, Tensor w, std::int64_t metric, bool normalize, double eps) {
  if (x.size(0) == 0) return;
  const Launch launch(x);
  const Target to = target(out, {x.size(0), w.size(0)}, "out");
  check(distance_forward(comparison_of(x, w, metric, normalize, eps), to, launch.stream), "normalized_distance");
}

void distance_bwd(Tensor grad_x, Tensor grad_w, Tensor grad, Tensor x, Tensor w, std::int64_t metric, bool normalize,
                  double eps) {
  const Launch launch(x);
  const Comparison comparison = comparison_of(x, w, metric, normalize, eps);
  const Matrix g = matrix(grad, "grad");
  STD_TORCH_CHECK(g.rows == comparison.x.rows && g.cols == comparison.w.rows, "dml_kernels: grad must be (N, M)");
  STD_TORCH_CHECK((g.dtype == Dtype::f64) == comparison.wide, "dml_kernels: fp64 with another dtype");
  const Scratch scratch(x, backward_bytes(comparison));
  check(distance_backward(comparison, g, target_like(grad_x, x, "grad_x"), target_like(grad_w, w, "grad_w"),
                          scratch.data(), launch.stream),
        "normalized_distance");
}

Labels labels(const Tensor& x, const Tensor& w, const Tensor& y, const OptionalTensor& c, const OptionalTensor& exclude,
              std::int64_t ignore_index) {
  const std::int64_t n = x.size(0), m = w.size(0);
  return {integers(y, n, "y"), integers(c, m, "c"), integers(exclude, n, "exclude"), ignore_index};
}

LogitArgs logit_args(std::int64_t n, std::int64_t m, double k_same, double o_same, double k_different,
                     double o_different, const OptionalTensor& scale, const OptionalTensor& col_bias) {
  return {k_same, o_same, k_different, o_different, vector(scale, n, "scale"), vector(col_bias, m, "col_bias")};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mlse_fwd(Tensor x, Tensor w, Tensor y, OptionalTensor c,
                                                    OptionalTensor exclude, OptionalTensor scale,
                                                    OptionalTensor col_bias, std::int64_t metric, bool normalize,
                                                    double k_same, double o_same, double k_different,
                                                    double o_different, double eps, std::int64_t ignore_index,
                                                    bool with_sums) {
  const Launch launch(x);
  const std::int64_t n = x.size(0), m = w.size(0);
  const Comparison comparison = comparison_of(x, w, metric, normalize, eps);
  const auto make = [&](std::int64_t size) {
    return torch::stable::new_empty(x, {size}, accumulation(comparison.wide));
  };
  Tensor same = make(n), different = make(n), sum_same = make(with_sums ? n : 0),
         sum_different = make(with_sums ? n : 0);
  if (n == 0) return {same, different, sum_same, sum_different};
  const LogitArgs args = logit_args(n, m, k_same, o_same, k_different, o_different, scale, col_bias);
  const LseOut out{same.mutable_data_ptr(),
                   different.mutable_data_ptr(),
                   with_sums ? sum_same.mutable_data_ptr() : nullptr,
                   with_sums ? sum_different.mutable_data_ptr() : nullptr,
                   {}};
  const Scratch scratch(x, lse_forward_bytes(n, m, x.size(1)));
  check(lse_forward(comparison, labels(x, w, y, c, exclude, ignore_index), args, out, scratch.data(), launch.stream),
        "masked_logsumexp");
  return {same, different, sum_same, sum_different};
}

void mlse_bwd(Tensor grad_x, Tensor grad_w, Tensor grad_scale, Tensor grad_col_bias, Tensor grad_same,
              Tensor grad_different, Tensor grad_sum_same, Tensor grad_sum_different, Tensor same, Tensor different,
              Tensor x, Tensor w, Tensor y, OptionalTensor c, OptionalTensor exclude, OptionalTensor scale,
              OptionalTensor col_bias, std::int64_t metric, bool normalize, double k_same, double o_same,
              double k_different, double o_different, double eps, std::int64_t ignore_index) {
  const Launch launch(x);
  const std::int64_t n = x.size(0), m = w.size(0);
  const Comparison comparison = comparison_of(x, w, metric, normalize, eps);
  const LogitArgs args = logit_args(n, m, k_same, o_same, k_different, o_different, scale, col_bias);
  const LseGrads grads{vector_unless_empty(grad_same, n, "grad_same"),
                       vector_unless_empty(grad_different, n, "grad_different"),
                       vector_unless_empty(grad_sum_same, n, "grad_sum_same"),
                       vector_unless_empty(grad_sum_different, n, "grad_sum_different"),
                       forward_result(same, n, comparison.wide, "same"),
                       forward_result(different, n, comparison.wide, "different"),
                       {}};
  const LseTargets targets{target_like(grad_x, x, "grad_x"), target_like(grad_w, w, "grad_w"),
                           target(grad_scale, {n}, "grad_scale"), target(grad_col_bias, {m}, "grad_col_bias")};
  const Scratch scratch(x, backward_bytes(comparison));
  check(lse_backward(comparison, labels(x, w, y, c, exclude, ignore_index), args, grads, targets, scratch.data(),
                     launch.stream),
        "masked_logsumexp");
}

constexpr std::int64_t squared = std::int64_t(Metric::sqeuclidean);

std::tuple<Tensor, Tensor, Tensor> proxy_nca_fwd(Tensor x, Tensor w, Tensor y, OptionalTensor scale,
                                                 OptionalTensor weight, double factor, bool exclude_positive,
                                                 double label_smoothing, double eps, std::int64_t ignore_index,
                                                 std::int64_t reduction) {
  const Launch launch(x);
  const std::int64_t n = x.size(0), m = w.size(0);
  STD_TORCH_CHECK(n > 0, "dml_kernels: proxy_nca needs at least one row");
  const Comparison comparison = comparison_of(x, w, squared, true, eps);
  const auto make = [&](std::int64_t size) {
    return torch::stable::new_empty(x, {size}, accumulation(comparison.wide));
  };
  Tensor same = make(n), different = make(n), sums_of_logits = make(label_smoothing > 0 ? 2 * n : 0);
  Tensor value = reduction ? torch::stable::new_empty(x, {}, accumulation(comparison.wide)) : make(n);
  const LogitArgs args{factor, 0, factor, 0, vector(scale, n, "scale"), {}};
  char* logits = label_smoothing > 0 ? static_cast<char*>(sums_of_logits.mutable_data_ptr()) : nullptr;
  const LseOut out{same.mutable_data_ptr(),
                   different.mutable_data_ptr(),
                   logits,
                   logits ? logits + n * (comparison.wide ? 8 : 4) : nullptr,
                   {true, exclude_positive, label_smoothing, vector(weight, n, "weight"),
                    choice<Reduction>(reduction, 3, "reduction"), value.mutable_data_ptr()}};
  const Scratch scratch(x, lse_forward_bytes(n, m, x.size(1)));
  check(lse_forward(comparison, {integers(y, n, "y"), nullptr, nullptr, ignore_index}, args, out, scratch.data(),
                    launch.stream),
        "proxy_nca");
  return {value, same, different};
}

void proxy_nca_bwd(Tensor grad_x, Tensor grad_w, Tensor grad_scale, Tensor grad, Tensor same, Tensor different,
                   Tensor x, Tensor w, Tensor y, OptionalTensor scale, OptionalTensor weight, double factor,
                   bool exclude_positive, double label_smoothing, double eps, std::int64_t ignore_index,
                   std::int64_t reduction) {
  const Launch launch(x);
  const std::int64_t n = x.size(0);
  const Comparison comparison = comparison_of(x, w, squared, true, eps);
  const LogitArgs args{factor, 0, factor, 0, vector(scale, n, "scale"), {}};
  const LseGrads grads{vector(grad, n, "grad"),
                       {},
                       {},
                       {},
                       forward_result(same, n, comparison.wide, "same"),
                       forward_result(different, n, comparison.wide, "different"),
                       {true, exclude_positive, label_smoothing, vector(weight, n, "weight"),
                        choice<Reduction>(reduction, 3, "reduction"), nullptr}};
  const LseTargets targets{
      target_like(grad_x, x, "grad_x"), target_like(grad_w, w, "grad_w"), target(grad_scale, {n}, "grad_scale"), {}};
  const Scratch scratch(x, backward_bytes(comparison));
  check(lse_backward(comparison, {integers(y, n, "y"), nullptr, nullptr, ignore_index}, args, grads, targets,
                     scratch.data(), launch.stream),
        "proxy_nca");
}

bool magnet_fits(Tensor x, std::int64_t clusters, bool given_centers) {
  return !magnet_refusal(x.size(0), clusters, x.size(1), given_centers, x.scalar_type() == ScalarType::Double);
}

MagnetArgs magnet_args(const Tensor& x, const Tensor& clusters, const Tensor& classes, const OptionalTensor& centers,
                       const OptionalTensor& variance, double alpha, bool normalize, double min_variance, double eps,
                       std::int64_t ignore_index, std::int64_t reduction) {
  STD_TORCH_CHECK(!centers || (centers->size(0) == classes.size(0) && centers->size(1) == x.size(1)),
                  "dml_kernels: a centre for each cluster");
  const Matrix rows = matrix(x, "x"), bank = centers ? matrix(*centers, "centers") : Matrix{};
  const bool wide = rows.dtype == Dtype::f64 || (centers && bank.dtype == Dtype::f64);
  return {widened(rows, wide),
          widened(bank, wide),
          integers(clusters, x.size(0), "clusters"),
          integers(classes, classes.size(0), "classes"),
          classes.size(0),
          ignore_index,
          vector(variance, 1, "variance"),
          alpha,
          min_variance,
          eps,
          normalize,
          wide,
          choice<Reduction>(reduction, 3, "reduction")};
}

std::tuple<Tensor, Tensor, Tensor> magnet_fwd(Tensor x, Tensor clusters, Tensor classes, OptionalTensor centers,
                                              OptionalTensor variance, double alpha, bool normalize,
                                              double min_variance, double eps, std::int64_t ignore_index,
                                              std::int64_t reduction) {
  const Launch launch(x);
  const std::int64_t n = x.size(0);
  const MagnetArgs args = magnet_args(x, clusters, classes, centers, variance, alpha, normalize, min_variance, eps,
                                      ignore_index, reduction);
  check(magnet_refusal(n, classes.size(0), x.size(1), centers.has_value(), args.wide), "magnet_loss");
  const ScalarType type = accumulation(args.wide);
  Tensor value = reduction ? torch::stable::new_empty(x, {}, type) : torch::stable::new_empty(x, {n}, type);
  Tensor different = torch::stable::new_empty(x, {n}, type), measured = torch::stable::new_empty(x, {}, type);
  const Scratch scratch(x, magnet_forward_bytes(args));
  check(magnet_forward(args, {value.mutable_data_ptr(), different.mutable_data_ptr(), measured.mutable_data_ptr()},
                       scratch.data(), launch.stream),
        "magnet_loss");
  return {value, different, measured};
}

void magnet_bwd(Tensor grad_x, Tensor grad_centers, Tensor grad_variance, Tensor grad, Tensor different, Tensor x,
                Tensor clusters, Tensor classes, OptionalTensor centers, OptionalTensor variance, double alpha,
                bool normalize, double min_variance, double eps, std::int64_t ignore_index, std::int64_t reduction) {
  const Launch launch(x);
  const std::int64_t n = x.size(0);
  const MagnetArgs args = magnet_args(x, clusters, classes, centers, variance, alpha, normalize, min_variance, eps,
                                      ignore_index, reduction);
  check(magnet_refusal(n, classes.size(0), x.size(1), centers.has_value(), args.wide), "magnet_loss");
  const MagnetTargets targets{
      target_like(grad_x, x, "grad_x"),
      centers ? target_like(grad_centers, *centers, "grad_centers") : target(grad_centers, {0}, "grad_centers"),
      target(grad_variance, {}, "grad_variance")};
  const Scratch scratch(x, magnet_backward_bytes(args));
  check(magnet_backward(args, vector(grad, n, "grad"), forward_result(different, n, args.wide, "different"), targets,
                        scratch.data(), launch.stream),
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
  m.impl("mlse_fwd", TORCH_BOX(&mlse_fwd));
  m.impl("mlse_bwd", TORCH_BOX(&mlse_bwd));
  m.impl("proxy_nca_fwd", TORCH_BOX(&proxy_nca_fwd));
  m.impl("proxy_nca_bwd", TORCH_BOX(&proxy_nca_bwd));
  m.impl("magnet_fits", TORCH_BOX(&magnet_fits));
  m.impl("magnet_fwd", TORCH_BOX(&magnet_fwd));
  m.impl("magnet_bwd", TORCH_BOX(&magnet_bwd));
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
