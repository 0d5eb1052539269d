// The ops of the CPU that pair and triplet losses use; register.cpp has the others.
#include <tuple>

#include "core/noise.h"
#include "register_cpu.h"

namespace {

using namespace dml;
using namespace dml::cpu;

HingeArgs hinge_args(std::int64_t n, const Tensor& offset_same, const Tensor& offset_different, double k_same,
                     double k_different) {
  return {k_same, k_different, Checked::vector(offset_same, n, "offset_same"),
          Checked::vector(offset_different, n, "offset_different")};
}

// `kind` is an empty tensor whose dtype is the product type.
std::tuple<Tensor, Tensor, Tensor, Tensor> hinge_forward(Tensor kind, Tensor x, Tensor w, Tensor y, OptionalTensor c,
                                                         OptionalTensor exclude, Tensor offset_same,
                                                         Tensor offset_different, double k_same, double k_different,
                                                         std::int64_t metric, bool normalize, double eps,
                                                         std::int64_t ignore_index, std::int64_t first_class) {
  const std::int64_t n = x.size(0);
  const auto make = [&](ScalarType dtype) { return torch::stable::new_empty(x, {n}, dtype); };
  const ScalarType acc = accumulation(kind);
  Tensor same = make(acc), different = make(acc), count_same = make(ScalarType::Long),
         count_different = make(ScalarType::Long);
  const Labels labels = Checked::labels(x.size(0), w.size(0), y, c, exclude, ignore_index, first_class);
  const HingeArgs args = hinge_args(n, offset_same, offset_different, k_same, k_different);
  const HingeOut out{same.mutable_data_ptr(), different.mutable_data_ptr(), count_same.mutable_data_ptr<std::int64_t>(),
                     count_different.mutable_data_ptr<std::int64_t>()};
  with_product_type(kind.scalar_type(), [&](auto zero) {
    using P = decltype(zero);
    const Comparison<P> comparison = comparison_of<P>(x, w, metric, normalize, eps, Cut::longer_side);
    masked_hinge_sum_fwd<P>(comparison, labels, args, out);
  });
  return {same, different, count_same, count_different};
}

void hinge_backward(Tensor grad_x, Tensor grad_w, Tensor slope_same, Tensor slope_different, OptionalTensor slope_own,
                    Tensor kind, Tensor x, Tensor w, Tensor y, OptionalTensor c, OptionalTensor exclude,
                    Tensor offset_same, Tensor offset_different, double k_same, double k_different, std::int64_t metric,
                    bool normalize, double eps, std::int64_t ignore_index, std::int64_t first_class) {
  const std::int64_t n = x.size(0);
  STD_TORCH_CHECK(!slope_own || (!c && first_class == 0),
                  "dml_kernels: a row's own column needs labels that are columns");
  const Labels labels = Checked::labels(x.size(0), w.size(0), y, c, exclude, ignore_index, first_class);
  const HingeArgs args = hinge_args(n, offset_same, offset_different, k_same, k_different);
  const HingeSlopes slopes{Checked::vector(slope_same, n, "slope_same"),
                           Checked::vector(slope_different, n, "slope_different"),
                           Checked::vector(slope_own, n, "slope_own")};
  const Target to_x = Checked::target_like(grad_x, x, "grad_x"), to_w = Checked::target_like(grad_w, w, "grad_w");
  with_product_type(kind.scalar_type(), [&](auto zero) {
    using P = decltype(zero);
    const Comparison<P> comparison = comparison_of<P>(x, w, metric, normalize, eps, Cut::longer_side);
    masked_hinge_sum_bwd<P>(comparison, labels, args, slopes, to_x, to_w);
  });
}

// Returns index, score and count of `same`, then of `different`. The tensors of a set that is not wanted are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> argmax_forward(
    Tensor kind, Tensor x, Tensor w, Tensor y, OptionalTensor c, OptionalTensor exclude, OptionalTensor low,
    OptionalTensor high, bool same, bool different, bool largest_same, bool largest_different, bool noise,
    std::int64_t seed, double cutoff, double nonzero_loss_cutoff, std::int64_t metric, bool normalize, double eps,
    std::int64_t ignore_index, std::int64_t first_class) {
  const std::int64_t n = x.size(0);
  const ScalarType acc = accumulation(kind);
  const auto make = [&](bool wanted, ScalarType dtype) { return torch::stable::new_empty(x, {wanted ? n : 0}, dtype); };
  const auto integers_of = [](Tensor& t) { return t.mutable_data_ptr<std::int64_t>(); };
  Tensor index_s = make(same, ScalarType::Long), score_s = make(same, acc), count_s = make(same, ScalarType::Long);
  Tensor index_d = make(different, ScalarType::Long), score_d = make(different, acc),
         count_d = make(different, ScalarType::Long);
  const Labels labels = Checked::labels(x.size(0), w.size(0), y, c, exclude, ignore_index, first_class);
  const ArgmaxArgs args{Checked::vector(low, n, "low"),
                        Checked::vector(high, n, "high"),
                        same,
                        different,
                        largest_same,
                        largest_different,
                        noise,
                        std::uint64_t(seed),
                        cutoff,
                        nonzero_loss_cutoff};
  const ArgmaxOut out_s{integers_of(index_s), score_s.mutable_data_ptr(), integers_of(count_s)};
  const ArgmaxOut out_d{integers_of(index_d), score_d.mutable_data_ptr(), integers_of(count_d)};
  with_product_type(kind.scalar_type(), [&](auto zero) {
    using P = decltype(zero);
    const Comparison<P> comparison = comparison_of<P>(x, w, metric, normalize, eps, Cut::longer_side);
    masked_argmax<P>(comparison, labels, args, out_s, out_d);
  });
  return {index_s, score_s, count_s, index_d, score_d, count_d};
}

// The noise generator by itself, for the test that compares its bits with those of dml_kernels/noise.py. `out` is
// (rows, columns) int64.
void noise_bits_of(Tensor out, std::int64_t seed, std::int64_t first_row, std::int64_t first_column) {
  STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous() && out.scalar_type() == ScalarType::Long, "out must be int64");
  auto* to = out.mutable_data_ptr<std::int64_t>();
  for (std::int64_t i = 0; i < out.size(0); ++i) {
    const std::uint64_t start = noise_row(std::uint64_t(seed), first_row + i);
    for (std::int64_t j = 0; j < out.size(1); ++j) *to++ = std::int64_t(noise_bits(start, first_column + j));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dml_kernels_cpu, m) {
  m.def(
      "hinge_fwd(Tensor kind, Tensor x, Tensor w, Tensor y, Tensor? c, Tensor? exclude, Tensor offset_same, "
      "Tensor offset_different, float k_same, float k_different, int metric, bool normalize, float eps, "
      "int ignore_index, int first_class) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "hinge_bwd(Tensor(a!) grad_x, Tensor(b!) grad_w, Tensor slope_same, Tensor slope_different, Tensor? slope_own, "
      "Tensor kind, Tensor x, Tensor w, Tensor y, Tensor? c, Tensor? exclude, Tensor offset_same, "
      "Tensor offset_different, float k_same, float k_different, int metric, bool normalize, float eps, "
      "int ignore_index, int first_class) -> ()");
  m.def(
      "argmax_fwd(Tensor kind, Tensor x, Tensor w, Tensor y, Tensor? c, Tensor? exclude, Tensor? low, Tensor? high, "
      "bool same, bool different, bool largest_same, bool largest_different, bool noise, int seed, "
      "float cutoff, float nonzero_loss_cutoff, int metric, bool normalize, float eps, int ignore_index, "
      "int first_class) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("noise_bits(Tensor(a!) out, int seed, int first_row, int first_column) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dml_kernels_cpu, CPU, m) {
  m.impl("hinge_fwd", TORCH_BOX(&hinge_forward));
  m.impl("hinge_bwd", TORCH_BOX(&hinge_backward));
  m.impl("argmax_fwd", TORCH_BOX(&argmax_forward));
  m.impl("noise_bits", TORCH_BOX(&noise_bits_of));
}
