// Finds the pairs of equal labels between the rows and a tile of the bank. Labels are compared and searched, never used
// as addresses.
#pragma once
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace dml::cpu {

// The pairs of equal labels in a tile, by row: columns[start[i]] up to columns[start[i + 1]] are those of row i.
struct TilePairs {
  std::vector<std::int64_t> start;
  std::vector<std::int32_t> columns;
  std::vector<std::int32_t> ignored;  // the columns that belong to no set, whatever the row
  bool any = false;

  std::int64_t count(std::int64_t i) const { return any ? start[i + 1] - start[i] : 0; }
  const std::int32_t* of(std::int64_t i) const { return columns.data() + (any ? start[i] : 0); }
};

class LabelIndex {
 public:
  // Of n rows. Those with the label `ignore` have no pairs, nor have those whose label no column has.
  LabelIndex(const Labels& labels, std::int64_t n)
      : y_(labels.y), c_(labels.c), n_(n), ignore_(labels.ignore), first_class_(labels.first_class), order_(n),
        sorted_(n) {
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(), [this](std::int64_t a, std::int64_t b) { return y_[a] < y_[b]; });
    for (std::int64_t i = 0; i < n; ++i) sorted_[i] = y_[order_[i]];
  }

  bool ignored(std::int64_t i) const { return y_[i] == ignore_; }

  void pairs_in(std::int64_t first, std::int64_t count, TilePairs& out) const {
    out.ignored.clear();
    for (std::int64_t j = 0; c_ && j < count; ++j)
      if (c_[first + j] == ignore_) out.ignored.push_back(std::int32_t(j));
    out.start.assign(n_ + 1, 0);
    visit(first, count, [&](std::int64_t row, std::int64_t) { ++out.start[row]; });
    // start[i] is first the end of row i's range; placing the columns moves it back to the beginning.
    std::partial_sum(out.start.begin(), out.start.end(), out.start.begin());
    out.any = out.start[n_] > 0;
    out.columns.resize(out.start[n_]);
    if (!out.any) return;
    visit(first, count, [&](std::int64_t row, std::int64_t j) { out.columns[--out.start[row]] = std::int32_t(j); });
  }

 private:
  template <class Visit>
  void visit(std::int64_t first, std::int64_t count, Visit visit) const {
    if (!c_) {  // labels follow from column indices: the rows with the labels of these columns
      const std::int64_t label = first_class_ + first;
      const auto low = std::lower_bound(sorted_.begin(), sorted_.end(), label);
      for (auto it = low; it != sorted_.end() && *it < label + count; ++it)
        if (*it != ignore_) visit(order_[it - sorted_.begin()], *it - label);
      return;
    }
    for (std::int64_t j = 0; j < count; ++j) {
      const std::int64_t label = c_[first + j];
      if (label == ignore_) continue;
      for (auto it = std::lower_bound(sorted_.begin(), sorted_.end(), label); it != sorted_.end() && *it == label; ++it)
        visit(order_[it - sorted_.begin()], j);
    }
  }

  const std::int64_t *y_, *c_;
  std::int64_t n_, ignore_, first_class_;
  std::vector<std::int64_t> order_, sorted_;
};

}  // namespace dml::cpu
