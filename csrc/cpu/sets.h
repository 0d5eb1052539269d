// The walk of the ops that treat the scores of a row set by set: those of its label (a short list), and all others (the
// row, with -inf for the entries of the list).
#pragma once
#include <limits>

#include "ops.h"

namespace dml::cpu {

// One thread's walk over the tiles of a slice, the row blocks of a tile and the rows of a block.
template <class P>
class SetWalk {
 public:
  using A = Acc<P>;
  static constexpr A minus_infinity = -std::numeric_limits<A>::infinity();

  SetWalk(const Comparison<P>& comparison, const Labels& labels, const LabelIndex& index, bool keep_scores)
      : scores(comparison), labels_(labels), index_(index), keep_scores_(keep_scores) {}

  TileScores<P> scores;
  std::vector<A> same;           // the scores of the row at the entries of its label, without the excluded ones
  std::vector<std::int32_t> at;  // and their columns in the tile

  void load(std::int64_t tile) {
    scores.load(tile);
    index_.pairs_in(scores.first, scores.count, pairs_);
  }

  // Computes the scores of row i: all of them in scores.z, and those of its label in `same` too.
  void score(std::int64_t i) {
    scores.score_row(i, A(1), A(0), nullptr, keep_scores_);
    row_ = i;
    same.clear(), at.clear();
    for (std::int64_t p = pairs_.count(i) - 1; p >= 0; --p) {  // a row's columns are listed from the last to the first
      const std::int32_t j = pairs_.of(i)[p];
      if (!labels_.excludes(i, scores.first + j)) same.push_back(scores.z[j]), at.push_back(j);
    }
  }

  // Keeps only the entries of other labels in scores.z; the rest become -inf.
  void keep_others() {
    A* z = scores.z.data();
    for (std::int64_t p = 0; p < pairs_.count(row_); ++p) z[pairs_.of(row_)[p]] = minus_infinity;
    for (const std::int32_t j : pairs_.ignored) z[j] = minus_infinity;
    labels_.visit_excluded(row_, scores.first, scores.count, [z](std::int64_t j) { z[j] = minus_infinity; });
  }

 private:
  const Labels& labels_;
  const LabelIndex& index_;
  bool keep_scores_;
  std::int64_t row_ = 0;
  TilePairs pairs_;
};

}  // namespace dml::cpu
