// The CUDA ops in plain C++ types: no torch, no CUDA headers. A launcher takes a stream, allocates nothing and does not
// wait; it returns null, or what went wrong. register_cuda.cpp brings the tensors.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../core/logit.h"

namespace dml::cuda {

enum class Dtype : std::int32_t { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// A tensor's memory as it came; data is null where it was not given. `load_width`: how many values of a row aligned loads
// of 16 bytes may take at a time: 8 halves, 4 (of halves 8 bytes, of fp64 two loads), or 1 where nothing is aligned.
struct Matrix {
  const void* data;
  Dtype dtype;
  int load_width;
  std::int64_t rows, cols, row_stride, col_stride;
};

struct Vector {
  const void* data;
  Dtype dtype;
  std::int64_t stride;
};

// Contiguous; data is null where it is not wanted.
struct Target {
  void* data;
  Dtype dtype;
};

// Rows x against the bank w. `wide`: sums in double (the accumulation type A of the kernels), else in float.
struct Comparison {
  Matrix x, w;
  Metric metric;
  bool normalize, wide;
  double eps;
};

// Contiguous; c and exclude may be null. Labels are compared, never used as addresses.
struct Labels {
  const std::int64_t *y, *c, *exclude;
  std::int64_t ignore;
};

struct LogitArgs {
  double k_same, o_same, k_different, o_different;
  Vector scale, col_bias;
};

enum class Reduction : std::int32_t { none = 0, sum = 1, mean = 2 };

// A Proxy-NCA loss on top of the two log-sum-exps: forward, the last block makes `value` (A, () or (n,)) of them;
// backward, the incoming gradient is that of the value.
struct ProxyNca {
  bool wanted, exclude_positive;
  double smoothing;
  Vector weight;  // of the rows; data may be null
  Reduction reduction;
  void* value;
};

struct LseOut {
  void *same, *different, *sum_same, *sum_different;  // (n,) of A; the sums may be null
  ProxyNca loss;
};

// The incoming gradients: of the four results, or with `loss.wanted` of its value alone, which `same` then holds.
struct LseGrads {
  Vector same, different, sum_same, sum_different;
  const void *lse_same, *lse_different;  // contiguous, A
  ProxyNca loss;
};

struct LseTargets {
  Target x, w, scale, col_bias;
};

struct MagnetArgs {
  Matrix x, centers;                       // centers.data is null where the batch's own means are the centres
  const std::int64_t *clusters, *classes;  // of each row, and the class of each cluster
  std::int64_t cluster_count, ignore;
  Vector variance;  // data is null where the batch's own is meant
  double alpha, min_variance, eps;
  bool normalize, wide;
  Reduction reduction;
};

struct MagnetOut {
  void *value, *different, *variance;  // of A: (n,) or (), (n,), ()
};

struct MagnetTargets {
  Target x, centers, variance;
};

using Stream = void*;  // a cudaStream_t
using Failure = const char*;

// Bytes of scratch memory that a launch needs; its content is of no interest before or after.
std::size_t lse_forward_bytes(std::int64_t n, std::int64_t m, std::int64_t d);
std::size_t backward_bytes(const Comparison&);
std::size_t magnet_forward_bytes(const MagnetArgs&);
std::size_t magnet_backward_bytes(const MagnetArgs&);

// 0 where a fused Magnet loss takes these sizes, else the reason it does not.
Failure magnet_refusal(std::int64_t n, std::int64_t clusters, std::int64_t d, bool given_centers, bool wide);

Failure lse_forward(const Comparison&, const Labels&, const LogitArgs&, const LseOut&, void* scratch, Stream);
Failure lse_backward(const Comparison&, const Labels&, const LogitArgs&, const LseGrads&, const LseTargets&,
                     void* scratch, Stream);
Failure distance_forward(const Comparison&, Target out, Stream);
Failure distance_backward(const Comparison&, const Matrix& grad, Target grad_x, Target grad_w, void* scratch, Stream);
Failure normalize_forward(const Matrix& x, double eps, Target out, Stream);
Failure normalize_backward(const Matrix& grad, const Matrix& x, double eps, Target out, Stream);
Failure magnet_forward(const MagnetArgs&, const MagnetOut&, void* scratch, Stream);
Failure magnet_backward(const MagnetArgs&, const Vector& grad, const void* different, const MagnetTargets&,
                        void* scratch, Stream);

}  // namespace dml::cuda
