// A running log-sum-exp: the maximum so far, and the sum of the exponentials relative to it.
#pragma once
#include <cmath>
#include <limits>

#include "portable.h"

namespace dml {

// E is the type in which the exponentials that rescale the sum are computed: double, or A where that costs too much.
template <class A, class E = double>
struct OnlineLse {
  static constexpr A lowest = -std::numeric_limits<A>::infinity();
  A max = lowest;
  double sum = 0;  // of exp(z - max); a double, because 10 million terms arrive in 40 thousand tiles

  // Adds a tile with maximum m, whose exponentials exp(z - m) sum to s. An empty tile has s = 0.
  DML_PORTABLE void add(A m, double s) {
    if (s == 0) return;
    if (m > max) {
      sum = sum * std::exp(E(max) - E(m)) + s;
      max = m;
    } else {  // also where m or max is NaN, which then stays in the sum
      sum += s * std::exp(E(m) - E(max));
    }
  }

  DML_PORTABLE void add(const OnlineLse& other) { add(other.max, other.sum); }

  // -inf for an empty set.
  DML_PORTABLE A value() const { return sum == 0 ? lowest : A(double(max) + std::log(sum)); }
};

}  // namespace dml
