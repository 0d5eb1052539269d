// The CUDA ops in plain C++ types: no torch, no CUDA headers. A launcher takes a stream, allocates nothing and does not
// wait; it returns null, or what went wrong. register_cuda.cpp calls it.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../core/arguments.h"
#include "../core/logit.h"

namespace dml::cuda {

// Rows x compared with the bank w. With `wide` the accumulation type A of the kernels is double, else float.
struct Comparison {
  Matrix x, w;
  Metric metric;
  bool normalize, wide;
  double eps;
};

// A Proxy-NCA loss on top of the two log-sum-exps. In the forward the last block computes `value` from them, of type A
// and shape () or (n,); in the backward the incoming gradient is that of the value.
struct ProxyNca {
  bool wanted, exclude_positive;
  double smoothing;
  Vector weight;  // of the rows; may be null
  Reduction reduction;
  void* value;
};

// The accumulation type is double where either side is fp64.
inline bool wide(const MagnetArgs& args) { return args.x.dtype == Dtype::f64 || args.centers.dtype == Dtype::f64; }

using Stream = void*;  // a cudaStream_t
using Failure = const char*;

// Bytes of scratch memory that a launch needs. Its content matters neither before the launch nor after it.
std::size_t lse_forward_bytes(std::int64_t n, std::int64_t m);
std::size_t backward_bytes(const Comparison&);
std::size_t magnet_forward_bytes(const MagnetArgs&);
std::size_t magnet_backward_bytes(const MagnetArgs&);

// Null where the fused Magnet loss takes these sizes, else the reason why it does not.
Failure magnet_refusal(std::int64_t n, std::int64_t clusters, bool given_centers, bool wide);

// The incoming gradients are those of the four results; or, with `loss.wanted`, that of its value alone, as `same`.
// Both log-sum-exps in LseGrads are contiguous, of the accumulation type.
Failure lse_forward(const Comparison&, const Labels&, const LogitArgs&, const LseOut&, const ProxyNca& loss,
                    void* scratch, Stream);
Failure lse_backward(const Comparison&, const Labels&, const LogitArgs&, const LseGrads&, const LseTargets&,
                     const ProxyNca& loss, void* scratch, Stream);
Failure distance_forward(const Comparison&, Target out, Stream);
Failure distance_backward(const Comparison&, const Matrix& grad, Target grad_x, Target grad_w, void* scratch, Stream);
Failure normalize_forward(const Matrix& x, double eps, Target out, Stream);
Failure normalize_backward(const Matrix& grad, const Matrix& x, double eps, Target out, Stream);
Failure magnet_forward(const MagnetArgs&, const MagnetOut&, void* scratch, Stream);
Failure magnet_backward(const MagnetArgs&, const Vector& grad, const void* different, const MagnetTargets&,
                        void* scratch, Stream);

}  // namespace dml::cuda
