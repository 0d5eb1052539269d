// A log-sum-exp that grows: a running maximum and the sum of exponentials below it.
#pragma once
#include <cmath>
#include <limits>

namespace dml {

template <class A>
struct OnlineLse {
  A max = -std::numeric_limits<A>::infinity();
  double sum = 0;  // of exp(z - max); double, as 10 million terms arrive in some 40 thousand tiles

  // Adds a tile whose exponentials over m, its maximum, sum to s; nothing when s is 0.
  void add(A m, double s) {
    if (s == 0) return;
    if (m > max) {
      sum = sum * std::exp(double(max) - double(m)) + s;
      max = m;
    } else {  // also where m or max is NaN: it stays in the sum
      sum += s * std::exp(double(m) - double(max));
    }
  }

  void add(const OnlineLse& other) { add(other.max, other.sum); }

  // -inf for an empty set.
  A value() const { return sum == 0 ? -std::numeric_limits<A>::infinity() : A(double(max) + std::log(sum)); }
};

}  // namespace dml
