// The arguments of the ops in plain types, for the CPU and the GPU alike: no torch, no CUDA headers.
#pragma once
#include <cstdint>

#include "portable.h"

namespace dml {

enum class Dtype : std::int32_t { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

constexpr int bytes_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// A tensor's memory as it came; strides count elements. `data` is null where the tensor was not given.
struct Matrix {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
  std::int64_t rows = 0, cols = 0, row_stride = 0, col_stride = 0;
  // Set for the GPU: the number of values of a row that aligned loads of up to 16 bytes may take at a time. 8 (halves
  // alone), 4 (halves in loads of 8 bytes, fp64 in two loads), or 1 where nothing is aligned.
  int load_width = 1;
};

// A vector as it came; a stride of 0 repeats one value. `data` is null where the vector was not given.
struct Vector {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
  std::int64_t stride = 1;

  DML_PORTABLE explicit operator bool() const { return data != nullptr; }
};

// Where a result goes, contiguous. `data` is null where the result is not wanted.
struct Target {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
};

// Contiguous; c and exclude may be null. Labels are compared, never used as addresses. Where c is null, a column's label
// is `first_class` plus its index. A row excludes `exclude_count` columns, which stand side by side; -1 is none.
struct Labels {
  const std::int64_t *y, *c, *exclude;
  std::int64_t ignore;
  std::int64_t first_class = 0, exclude_count = 1;

  bool excludes(std::int64_t i, std::int64_t column) const {
    for (std::int64_t e = 0; exclude && e < exclude_count; ++e)
      if (exclude[i * exclude_count + e] == column) return true;
    return false;
  }

  // Calls visit(j) for each column first + j, j < count, that row i excludes.
  template <class Visit>
  void visit_excluded(std::int64_t i, std::int64_t first, std::int64_t count, Visit visit) const {
    for (std::int64_t e = 0; exclude && e < exclude_count; ++e) {
      const std::int64_t j = exclude[i * exclude_count + e] - first;
      if (j >= 0 && j < count) visit(j);
    }
  }
};

// The logit of a pair is k t (s - o) + b: k and o of the pair's set, t from `scale`, b from `col_bias`.
struct LogitArgs {
  double k_same, o_same, k_different, o_different;
  Vector scale, col_bias;
};

// (n,) of the accumulation type: the log-sum-exps, and the sums of logits, which may be null.
struct LseOut {
  void *same, *different, *sum_same, *sum_different;
};

// The incoming gradients of the four results, which may be absent, and the forward's log-sum-exps.
struct LseGrads {
  Vector same, different, sum_same, sum_different;
  Vector lse_same, lse_different;
};

// `scale` is (n,), one value for each row, even where the scale is one number.
struct LseTargets {
  Target x, w, scale, col_bias;
};

enum class Reduction : std::int32_t { none = 0, sum = 1, mean = 2 };

// The Magnet loss of rows x in clusters; dml_kernels/losses/magnet.py has the formula.
struct MagnetArgs {
  Matrix x, centers;                       // centers.data is null where the means of the batch are the centres
  const std::int64_t *clusters, *classes;  // the cluster of each row, and the class of each cluster
  std::int64_t cluster_count, ignore;
  Vector variance;  // null where the batch's variance is meant
  double alpha, min_variance, eps;
  bool normalize;
  Reduction reduction;
};

// Of the accumulation type: the value (n,) or (), the log-sum-exp over other classes (n,), the measured variance ().
struct MagnetOut {
  void *value, *different, *variance;
};

struct MagnetTargets {
  Target x, centers, variance;
};

}  // namespace dml
