// From torch's tensors to the plain types of core/arguments.h, through libtorch's stable ABI. Python checks the arguments
// first; an op can be called without Python, so whatever memory depends on is checked again here.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>

#include "core/arguments.h"

namespace dml {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The number of one of `count` choices (a metric, a policy, a reduction) as its enumerator.
template <class Choice>
Choice choice(std::int64_t code, std::int64_t count, const char* name) {
  STD_TORCH_CHECK(code >= 0 && code < count, "dml_kernels: ", name, " must be a code from 0 to ", count - 1, "; got ",
                  code);
  return Choice(code);
}

inline bool has_shape(const Tensor& t, std::initializer_list<std::int64_t> shape) {
  if (t.dim() != std::int64_t(shape.size())) return false;
  std::int64_t dimension = 0;
  for (const std::int64_t size : shape)
    if (t.size(dimension++) != size) return false;
  return true;
}

inline Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Double:
      return Dtype::f64;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, "dml_kernels: ", name, " must be float32, float64, bfloat16 or float16");
      return Dtype::f32;
  }
}

// What sums are kept in.
inline ScalarType accumulation(bool wide) { return wide ? ScalarType::Double : ScalarType::Float; }

// What an op's forward and backward have in common, in the order of their schemas.
struct LogitCall {
  Tensor x, w, y;
  OptionalTensor c, exclude, scale, col_bias;
  std::int64_t metric;
  bool normalize;
  double k_same, o_same, k_different, o_different, eps;
  std::int64_t ignore_index;
};

struct ProxyCall {
  Tensor x, w, y;
  OptionalTensor scale, weight;
  double factor;
  bool exclude_positive;
  double label_smoothing, eps;
  std::int64_t ignore_index, reduction;
};

struct MagnetCall {
  Tensor x, clusters, classes;
  OptionalTensor centers, variance;
  double alpha;
  bool normalize;
  double min_variance, eps;
  std::int64_t ignore_index, reduction;
};

// The tensors of masked_logsumexp's backward before those: targets, incoming gradients, the forward's results.
struct LseTensors {
  Tensor grad_x, grad_w, grad_scale, grad_col_bias;
  Tensor grad_same, grad_different, grad_sum_same, grad_sum_different;
  Tensor same, different;
};

// The arguments of a registered op one after the other, in the order of its schema. For ops with so many arguments that
// a function for TORCH_BOX, which has a parameter for each, would be unreadable.
class Stack {
 public:
  Stack(StableIValue* values, std::uint64_t size) : next_(values), end_(values + size) {}

  Tensor tensor() { return take<Tensor>(); }
  OptionalTensor optional() { return take<OptionalTensor>(); }
  std::int64_t integer() { return take<std::int64_t>(); }
  double number() { return take<double>(); }
  bool flag() { return take<bool>(); }

  LogitCall logit_call() {
    return {tensor(), tensor(), tensor(), optional(), optional(), optional(), optional(), integer(),
            flag(),   number(), number(), number(),   number(),   number(),   integer()};
  }

  ProxyCall proxy_call() {
    return {tensor(), tensor(), tensor(), optional(), optional(), number(),
            flag(),   number(), number(), integer(),  integer()};
  }

  MagnetCall magnet_call() {
    return {tensor(), tensor(), tensor(), optional(), optional(), number(),
            flag(),   number(), number(), integer(),  integer()};
  }

  LseTensors lse_tensors() {
    return {tensor(), tensor(), tensor(), tensor(), tensor(), tensor(), tensor(), tensor(), tensor(), tensor()};
  }

  // Every argument must be taken, or its memory would leak.
  void end() const { STD_TORCH_CHECK(next_ == end_, "dml_kernels: the schema has more arguments than the op reads"); }

 private:
  template <class T>
  T take() {
    STD_TORCH_CHECK(next_ != end_, "dml_kernels: the op reads more arguments than the schema has");
    return torch::stable::detail::to<T>(*next_++);
  }

  StableIValue *next_, *end_;
};

// What TORCH_BOX is for other functions: an op whose function takes its arguments off the stack.
template <auto function>
void boxed(StableIValue* values, std::uint64_t inputs, std::uint64_t) {
  Stack stack(values, inputs);
  if constexpr (std::is_void_v<decltype(function(stack))>)
    function(stack);
  else
    std::apply([&](const auto&... tensors) { ((*values++ = torch::stable::detail::from<Tensor>(tensors)), ...); },
               function(stack));
}

// Plain arguments from tensors that are where Device says.
template <class Device>
struct CheckedOn {
  static Matrix matrix(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.dim() == 2 && Device::holds(t), "dml_kernels: ", name, " must be a matrix on ", Device::name);
    const Dtype dtype = dtype_of(t, name);
    const auto address = reinterpret_cast<std::uintptr_t>(t.const_data_ptr());
    const auto aligned = [&](int count) {
      const std::uintptr_t bytes = count * bytes_of(dtype), load = bytes < 16 ? bytes : 16;
      return t.stride(1) == 1 && t.stride(0) % count == 0 && address % load == 0;
    };
    const int load_width = bytes_of(dtype) == 2 && aligned(8) ? 8 : aligned(4) ? 4 : 1;
    return {t.const_data_ptr(), dtype, t.size(0), t.size(1), t.stride(0), t.stride(1), load_width};
  }

  // (n,), or () for one value that serves all.
  static Vector vector(const Tensor& t, std::int64_t n, const char* name) {
    const bool scalar = t.dim() == 0;
    STD_TORCH_CHECK((scalar || (t.dim() == 1 && t.size(0) == n)) && Device::holds(t), "dml_kernels: ", name,
                    " must have ", n, " elements on ", Device::name);
    return {t.const_data_ptr(), dtype_of(t, name), scalar ? 0 : t.stride(0)};
  }

  static Vector vector(const OptionalTensor& t, std::int64_t n, const char* name) {
    return t ? vector(*t, n, name) : Vector{};
  }

  static Vector vector_unless_empty(const Tensor& t, std::int64_t n, const char* name) {
    return t.numel() == 0 ? Vector{} : vector(t, n, name);
  }

  static const std::int64_t* integers(const Tensor& t, std::int64_t n, const char* name, bool pairs = false) {
    const bool shaped = has_shape(t, {n}) || (pairs && has_shape(t, {n, 2}));
    STD_TORCH_CHECK(shaped && t.is_contiguous() && t.scalar_type() == ScalarType::Long && Device::holds(t),
                    "dml_kernels: ", name, " must be ", n, " contiguous int64 on ", Device::name);
    return t.const_data_ptr<std::int64_t>();
  }

  static const std::int64_t* integers(const OptionalTensor& t, std::int64_t n, const char* name) {
    return t ? integers(*t, n, name) : nullptr;
  }

  // The labels of m columns are numbers of 64 bits.
  static void check_first_class(std::int64_t first_class, std::int64_t m) {
    STD_TORCH_CHECK(first_class >= 0 && first_class <= std::numeric_limits<std::int64_t>::max() - m,
                    "dml_kernels: first_class must be in [0, 2^63 - ", m, "); got ", first_class);
  }

  static Labels labels(std::int64_t n, std::int64_t m, const Tensor& y, const OptionalTensor& c,
                       const OptionalTensor& exclude, std::int64_t ignore_index, std::int64_t first_class = 0) {
    check_first_class(first_class, m);
    STD_TORCH_CHECK(first_class == 0 || !c,
                    "dml_kernels: first_class needs labels that follow from columns, without c");
    const std::int64_t* excluded = exclude ? integers(*exclude, n, "exclude", Device::excludes_pairs) : nullptr;
    const std::int64_t each = exclude && exclude->dim() == 2 ? 2 : 1;
    return {integers(y, n, "y"), integers(c, m, "c"), excluded, ignore_index, first_class, each};
  }

  // Contiguous and of this shape; or empty where the result is not wanted.
  static Target target(const Tensor& t, std::initializer_list<std::int64_t> shape, const char* name) {
    if (t.numel() == 0) return {};
    STD_TORCH_CHECK(has_shape(t, shape) && t.is_contiguous() && Device::holds(t), "dml_kernels: ", name,
                    " must be contiguous, of the shape of its gradient, on ", Device::name);
    return {t.mutable_data_ptr(), dtype_of(t, name)};
  }

  // A gradient's target, of the shape of the matrix that it belongs to.
  static Target target_like(const Tensor& t, const Tensor& like, const char* name) {
    return target(t, {like.size(0), like.size(1)}, name);
  }

  static LogitArgs logit_args(const LogitCall& call, std::int64_t columns) {
    return {call.k_same,
            call.o_same,
            call.k_different,
            call.o_different,
            vector(call.scale, call.x.size(0), "scale"),
            vector(call.col_bias, columns, "col_bias")};
  }

  static LseGrads lse_grads(const LseTensors& t, std::int64_t n) {
    return {vector_unless_empty(t.grad_same, n, "grad_same"),
            vector_unless_empty(t.grad_different, n, "grad_different"),
            vector_unless_empty(t.grad_sum_same, n, "grad_sum_same"),
            vector_unless_empty(t.grad_sum_different, n, "grad_sum_different"),
            vector(t.same, n, "same"),
            vector(t.different, n, "different")};
  }

  static LseTargets lse_targets(const LseTensors& t, const LogitCall& call, std::int64_t columns) {
    return {target_like(t.grad_x, call.x, "grad_x"), target_like(t.grad_w, call.w, "grad_w"),
            target(t.grad_scale, {call.x.size(0)}, "grad_scale"), target(t.grad_col_bias, {columns}, "grad_col_bias")};
  }

  static MagnetArgs magnet_args(const MagnetCall& call) {
    const auto& [x, clusters, classes, centers, variance, alpha, normalize, min_variance, eps, ignore_index,
                 reduction] = call;
    const Matrix rows = matrix(x, "x"), bank = centers ? matrix(*centers, "centers") : Matrix{};
    STD_TORCH_CHECK(!centers || (bank.rows == classes.size(0) && bank.cols == rows.cols),
                    "dml_kernels: centers must have a row for each cluster, as wide as x");
    return {rows,
            bank,
            integers(clusters, x.size(0), "clusters"),
            integers(classes, classes.size(0), "classes"),
            classes.size(0),
            ignore_index,
            vector(variance, 1, "variance"),
            alpha,
            min_variance,
            eps,
            normalize,
            choice<Reduction>(reduction, 3, "reduction")};
  }

  static MagnetTargets magnet_targets(const Tensor& grad_x, const Tensor& grad_centers, const Tensor& grad_variance,
                                      const MagnetCall& call) {
    return {target_like(grad_x, call.x, "grad_x"),
            call.centers ? target_like(grad_centers, *call.centers, "grad_centers")
                         : target(grad_centers, {0}, "grad_centers"),
            target(grad_variance, {}, "grad_variance")};
  }
};

}  // namespace dml
