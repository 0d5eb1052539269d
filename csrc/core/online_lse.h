// A log-sum-exp that grows: a running maximum and the sum of exponentials below it.
#pragma once
#include <cmath>
#include <limits>

#include "portable.h"

namespace dml {

// E is the type of the exponentials that rescale: double, or A where a double's exponential costs too much.
template <class A, class E = double>
struct OnlineLse {
  static constexpr A lowest = -std::numeric_limits<A>::infinity();
  A max = lowest;
  double sum = 0;  // of exp(z - max); double, as 10 million terms arrive in some 40 thousand tiles

  // Adds a tile whose exponentials over m, its maximum, sum to s; nothing when s is 0.
  DML_PORTABLE void add(A m, double s) {
    if (s == 0) return;
    if (m > max) {
      sum = sum * std::exp(E(max) - E(m)) + s;
      max = m;
    } else {  // also where m or max is NaN: it stays in the sum
      sum += s * std::exp(E(m) - E(max));
    }
  }

  DML_PORTABLE void add(const OnlineLse& other) { add(other.max, other.sum); }

  // -inf for an empty set.
  DML_PORTABLE A value() const { return sum == 0 ? lowest : A(double(max) + std::log(sum)); }
};

}  // namespace dml
