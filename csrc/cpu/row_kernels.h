// The vector loops over one row of a tile, compiled once for each instruction set and chosen at run time.
// A is the accumulation type (float or double), P the product type (float, double or bfloat16).
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "../core/logit.h"

namespace dml::cpu {

using bf16 = torch::headeronly::BFloat16;
using fp16 = torch::headeronly::Half;  // only stored: it is widened before anything is computed

// What scores and logits take from the columns of a tile; null pointers stand for 1 (r) or 0 (b).
template <class A>
struct Columns {
  const A* r;   // 1 / |w_j|
  const A* sq;  // |p_j|^2, for distances
  const A* b;   // column bias
};

// What they take from the row.
template <class A>
struct Row {
  A r;      // 1 / |x_i|
  A sq;     // |u_i|^2
  A kt, o;  // k t_i and the offset
};

template <class A>
struct RowKernels {
  // Computes z_j, and s_j unless s is null, from raw_j. Returns whether a distance is so small that it must be computed
  // from differences.
  bool (*logits)(Metric metric, const A* raw, const Row<A>& row, const Columns<A>& columns, A* z, A* s, std::int64_t n);
  A (*max)(const A* z, std::int64_t n);  // -inf for n = 0
  double (*sum_exp)(const A* z, std::int64_t n, A max);
  double (*sum_used)(const A* z, std::int64_t n);  // without entries of -inf
  // In place: g exp(z - lse) + h; 0 where z is -inf. For an empty set lse is +inf.
  void (*weights)(A* z, std::int64_t n, A lse, A g, A h);
  void (*root_grad)(A* dz, const A* s, std::int64_t n);  // in place: dz_j times the root's slope at s_j
  A (*sum)(const A* v, std::int64_t n);
  A (*dot)(const A* a, const A* b, std::int64_t n);
  // |u - p|^2 of rows that are scaled already. If they were scaled here, a fused multiply-add could keep equal rows
  // from giving 0.
  A (*squared_distance)(const A* u, const A* p, std::int64_t n);
  void (*add)(A* total, const A* v, std::int64_t n);
  void (*scale)(A* v, A f, std::int64_t n);
  void (*axpy)(A* y, A a, const A* x, std::int64_t n);
  // out_j = v_j f r_j, rounded to the product type.
  void (*scale_each)(const A* v, A f, const A* r, A* out, std::int64_t n);
  void (*scale_each_bf16)(const A* v, A f, const A* r, bf16* out, std::int64_t n);
  void (*widen)(const bf16* v, A* out, std::int64_t n);
  void (*add_bf16)(A* total, const bf16* v, std::int64_t n);
  void (*widen_fp16)(const fp16* v, A* out, std::int64_t n);
  void (*narrow_fp16)(const A* v, fp16* out, std::int64_t n);
  void (*affine)(A* z, A k, A o, std::int64_t n);  // in place: k z + o
  // The sum of those z that are positive or NaN. Adds their number to `count`.
  double (*sum_positive)(const A* z, std::int64_t n, std::int64_t& count);
  void (*indicate)(A* z, A value, std::int64_t n);  // in place: `value` where sum_positive would add z, else 0
  // In place: sign z where low <= z <= high, else (and for NaN) -inf.
  void (*within)(A* z, A sign, A low, A high, std::int64_t n);
  std::int64_t (*count_used)(const A* z, std::int64_t n);  // those above -inf
  // The pooled scores of n columns, and the index of the first centre of a column that has the pooled score.
  void (*max_pool)(const A* s, std::int64_t centres, A* pooled, std::int32_t* first, std::int64_t n);
  // slope, unless null, is the derivative of the pooled score by each centre's score. work holds 2 n (centres + 1)
  // values.
  void (*softmax_pool)(const A* s, std::int64_t centres, A gamma, A* work, A* pooled, A* slope, std::int64_t n);
  // In place: slope_ck ds_c.
  void (*spread)(const A* ds, std::int64_t centres, A* slope, std::int64_t n);
  // The weights alpha of Circle loss, and its logits z, for the set `different`.
  void (*circle)(const A* s, const Row<A>& row, const A* b, A m, A* alpha, A* z, std::int64_t n);
  void (*multiply_by)(A* v, const A* f, std::int64_t n);
};

namespace baseline {
template <class A>
const RowKernels<A>& table();
}
namespace avx2 {
template <class A>
const RowKernels<A>& table();
}
namespace avx512 {
template <class A>
const RowKernels<A>& table();
}

// The table for this processor.
template <class A>
const RowKernels<A>& row_kernels();

}  // namespace dml::cpu
