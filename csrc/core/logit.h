// The score and the logit of a pair of a row and a bank entry, for the CPU and the GPU alike.
//
//   raw   x.w, as the matrix product gives it
//   s     score, larger is closer:  r_i r_j raw  |  -(sq_i + sq_j - 2 r_i r_j raw)  |  -sqrt of that
//   z     logit:                    k t_i (s - o) + b_j, with k and o of the entry's set
#pragma once
#include <cstdint>

#include "portable.h"

namespace dml {

enum class Metric : std::int64_t { dot = 0, sqeuclidean = 1, euclidean = 2 };

// A squared distance below this share of |u|^2 + |p|^2 is summed from differences, because the expanded form has lost 4
// bits by cancellation.
constexpr double near_share = 1.0 / 16;

template <class A>
DML_PORTABLE inline A logit(A s, A kt, A o, A b) {
  return kt * (s - o) + b;
}

// d(-sqrt(d2)) / d(-d2) = 1 / (2 sqrt(d2)), and 0 at zero distance.
template <class A>
DML_PORTABLE inline A root_slope(A s) {
  return s == A(0) ? A(0) : A(-0.5) / s;
}

}  // namespace dml
