// Logit policies, which stand between the scores of a row in a tile and its logits. masked_logsumexp in
// dml_kernels/ops/masked_logsumexp.py has the formulas.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "row_kernels.h"

namespace dml::cpu {

struct Policy {
  enum class Kind : std::int64_t { linear = 0, quadratic = 1, max_pool = 2, softmax_pool = 3 };

  Kind kind = Kind::linear;
  std::int64_t centres = 1;  // bank entries in a column
  double number = 0;         // m of quadratic, gamma of softmax_pool

  bool pools() const { return kind == Kind::max_pool || kind == Kind::softmax_pool; }
  bool quadratic() const { return kind == Kind::quadratic; }
};

// One thread's buffers for the pooled scores of a row in a tile, and for the way back from their gradient.
template <class A>
class Pool {
 public:
  Pool(const Policy& policy, std::int64_t tile, bool gradients) : policy_(policy), gradients_(gradients) {
    if (!policy.pools()) return;
    const std::int64_t columns = tile / policy.centres;
    scores_.resize(columns);
    if (gradients) slope_.resize(tile);
    if (policy.kind == Policy::Kind::max_pool)
      winner_.resize(columns);
    else
      work_.resize(2 * (tile + columns));
  }

  const A* scores() const { return scores_.data(); }

  // s holds the scores of n columns; the centres of a column are next to each other.
  void pool(const A* s, std::int64_t n) {
    const auto& kernels = row_kernels<A>();
    if (policy_.kind == Policy::Kind::max_pool)
      kernels.max_pool(s, policy_.centres, scores_.data(), winner_.data(), n);
    else
      kernels.softmax_pool(s, policy_.centres, A(policy_.number), work_.data(), scores_.data(),
                           gradients_ ? slope_.data() : nullptr, n);
  }

  // Turns the gradient of the pooled scores into that of each centre's score. To be called once after each pool().
  A* spread(const A* ds, std::int64_t n) {
    if (policy_.kind == Policy::Kind::softmax_pool) {
      row_kernels<A>().spread(ds, policy_.centres, slope_.data(), n);
      return slope_.data();
    }
    std::fill_n(slope_.data(), n * policy_.centres, A(0));
    for (std::int64_t c = 0; c < n; ++c) slope_[c * policy_.centres + winner_[c]] = ds[c];
    return slope_.data();
  }

 private:
  const Policy policy_;
  const bool gradients_;
  std::vector<A> scores_, slope_, work_;
  std::vector<std::int32_t> winner_;
};

}  // namespace dml::cpu
