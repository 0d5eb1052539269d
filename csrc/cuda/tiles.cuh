// A block's tile of pairs: the rows that the block owns, of one side, against rows of the other side, both in shared
// memory in the accumulation type A. A thread holds the owned rows ty + 8 n and the other rows tx + 16 m; the 16
// threads of an owned row are one half of a warp.
//
// Distances are always summed from differences. That is twice the arithmetic of the expanded form, half of it hidden by
// shared memory; but near pairs are no special case, neither in the score nor in the gradient.
#pragma once
#include "platform.cuh"

namespace dml::cuda {

constexpr int other_lanes = 16, owned_lanes = block_threads / other_lanes;
constexpr int run_length = 16;  // products that are summed at a time; then the runs are, so that rounding stays small
constexpr int row_pad = 4;      // so that rows of a tile begin in different banks

// D, in chunks that fit into shared memory. With `whole` one chunk holds all of D, so that rows are read once and
// scaled in place.
struct Chunks {
  int size;  // a multiple of 8
  bool whole;

  __device__ int stride() const { return size + row_pad; }
};

// `rows` is the number of staged rows of both sides.
template <class A>
Chunks chunks_of(std::int64_t d, int rows, std::int64_t bytes) {
  const std::int64_t most = (bytes / std::int64_t(rows * sizeof(A)) - row_pad) / 8 * 8, all = (d + 7) / 8 * 8;
  return {int(all < most ? all : most), all <= most};
}

template <class A, int count>
__device__ __forceinline__ void stage_runs(const Matrix& m, std::int64_t first, int rows, std::int64_t k, Chunks chunks,
                                           const A* norms, A* tile) {
  const int runs = chunks.size / count;
  DML_UNROLL_BY(4)
  for (int at = threadIdx.x; at < rows * runs; at += block_threads) {
    const int row = at / runs, column = at % runs * count;
    Run<A, count> run{};
    if (first + row < m.rows) run = load_run<A, count>(m, first + row, k + column);
    if (norms) {
      DML_UNROLL
      for (int i = 0; i < count; ++i) run.v[i] /= norms[row];
    }
    auto* to = reinterpret_cast<Quad<A>*>(tile + row * chunks.stride() + column);
    DML_UNROLL
    for (int i = 0; i < count; i += 4) to[i / 4] = {run.v[i], run.v[i + 1], run.v[i + 2], run.v[i + 3]};
  }
}

// Copies rows [first, first + rows), columns [k, k + chunk) of a matrix to `tile` in shared memory, divided by `norms`
// where given, with 0 beyond the edges.
template <class A>
__device__ void stage(const Matrix& m, std::int64_t first, int rows, std::int64_t k, Chunks chunks, const A* norms,
                      A* tile) {
  if constexpr (std::is_same_v<A, float>)
    if (m.load_width == 8) return stage_runs<A, 8>(m, first, rows, k, chunks, norms, tile);
  stage_runs<A, 4>(m, first, rows, k, chunks, norms, tile);
}

// One side of the pairs: a matrix, its staged rows, and max(|row|, eps) of these. Rows are divided by their norm,
// because multiplying by its inverse would round twice.
template <class A>
struct Side {
  const Matrix& matrix;
  A *staged, *norms;
  int rows;
  bool normalize;
  A eps;

  // Prepares rows [first, first + rows): stages them whole and scaled, or computes their norms alone where D is in
  // several chunks. The caller provides the barriers around it.
  __device__ void prepare(std::int64_t first, Chunks chunks) {
    if (chunks.whole) stage<A>(matrix, first, rows, 0, chunks, nullptr, staged);
    if (!normalize) return;
    if (chunks.whole) __syncthreads();
    const int lane = threadIdx.x % warp_lanes;
    for (int row = threadIdx.x / warp_lanes; row < rows; row += block_threads / warp_lanes) {
      A sum = 0;
      A* values = staged + row * chunks.stride();
      if (chunks.whole) {
        for (int k = lane * 4; k < chunks.size; k += warp_lanes * 4)
          sum += square(*reinterpret_cast<const Quad<A>*>(values + k));
      } else if (first + row < matrix.rows) {
        // In runs of 4 with any alignment, so that equal rows of another dtype or stride have equal norms.
        for (std::int64_t k = lane * 4; k < matrix.cols; k += warp_lanes * 4)
          sum += square(load_run<A, 4>(matrix, first + row, k));
      }
      const A norm = at_least(sqrt(warp_sum(sum)), eps);
      if (lane == 0) norms[row] = norm;
      if (!chunks.whole) continue;
      for (int k = lane * 4; k < chunks.size; k += warp_lanes * 4) {  // each lane scales what it read
        Quad<A>& quad = *reinterpret_cast<Quad<A>*>(values + k);
        DML_UNROLL
        for (int i = 0; i < 4; ++i) quad.v[i] /= norm;
      }
    }
  }

  // Value k of staged row `row`, scaled, from shared memory or from the matrix.
  __device__ A value(std::int64_t first, int row, std::int64_t k, Chunks chunks) const {
    if (chunks.whole) return staged[row * chunks.stride() + k];
    const A raw = load<A>(matrix, first + row, k);
    return normalize ? raw / norms[row] : raw;
  }
};

// sums[n][m] = u.p, or |u - p|^2, of the owned row ty + 8 n and the other row tx + 16 m. Both sides must be prepared,
// with a barrier since.
template <class A, bool difference, int owned_count, int other_count>
__device__ void pair_sums(const Side<A>& owned, std::int64_t owned_first, const Side<A>& other,
                          std::int64_t other_first, Chunks chunks, A (&sums)[owned_count][other_count]) {
  const int tx = threadIdx.x % other_lanes, ty = threadIdx.x / other_lanes;
  DML_UNROLL
  for (int n = 0; n < owned_count; ++n) {
    DML_UNROLL
    for (int m = 0; m < other_count; ++m) sums[n][m] = 0;
  }
  for (std::int64_t first = 0; first < owned.matrix.cols; first += chunks.size) {
    if (!chunks.whole) {
      __syncthreads();  // the previous chunk has been read
      stage<A>(owned.matrix, owned_first, owned.rows, first, chunks, owned.normalize ? owned.norms : nullptr,
               owned.staged);
      stage<A>(other.matrix, other_first, other.rows, first, chunks, other.normalize ? other.norms : nullptr,
               other.staged);
      __syncthreads();
    }
    for (int begin = 0; begin < chunks.size; begin += run_length) {
      const int end = begin + run_length < chunks.size ? begin + run_length : chunks.size;
      A part[owned_count][other_count] = {};
      for (int k = begin; k < end; k += 4) {
        Quad<A> u[owned_count], p[other_count];
        DML_UNROLL
        for (int n = 0; n < owned_count; ++n)
          u[n] = *reinterpret_cast<const Quad<A>*>(owned.staged + (ty + owned_lanes * n) * chunks.stride() + k);
        DML_UNROLL
        for (int m = 0; m < other_count; ++m)
          p[m] = *reinterpret_cast<const Quad<A>*>(other.staged + (tx + other_lanes * m) * chunks.stride() + k);
        DML_UNROLL
        for (int n = 0; n < owned_count; ++n) {
          DML_UNROLL
          for (int m = 0; m < other_count; ++m) {
            DML_UNROLL
            for (int i = 0; i < 4; ++i) {
              const A step = difference ? u[n].v[i] - p[m].v[i] : u[n].v[i];
              part[n][m] += step * (difference ? step : p[m].v[i]);
            }
          }
        }
      }
      DML_UNROLL
      for (int n = 0; n < owned_count; ++n) {
        DML_UNROLL
        for (int m = 0; m < other_count; ++m) sums[n][m] += part[n][m];
      }
    }
  }
}

template <class A>
__device__ __forceinline__ A score(Metric metric, A sum) {
  if (metric == Metric::dot) return sum;
  return metric == Metric::sqeuclidean ? -sum : -sqrt(sum);
}

// --- labels and logits

template <class A>
struct RowInfo {
  std::int64_t label, exclude;
  A scale;
  bool ignored;

  __device__ RowInfo(const Labels& labels, const LogitArgs& args, std::int64_t i, std::int64_t n)
      : label(0), exclude(-1), scale(0), ignored(true) {
    if (i >= n) return;
    label = labels.y[i];
    ignored = label == labels.ignore;
    if (labels.exclude) exclude = labels.exclude[i];
    scale = load<A>(args.scale, i, A(1));
  }
};

template <class A>
struct ColumnInfo {
  std::int64_t index, label;
  A bias;
  bool ignored;

  __device__ ColumnInfo(const Labels& labels, const LogitArgs& args, std::int64_t j, std::int64_t m)
      : index(j), label(j), bias(0), ignored(true) {
    if (j >= m) return;
    if (labels.c) label = labels.c[j];
    ignored = labels.c && label == labels.ignore;
    bias = load<A>(args.col_bias, j, A(0));
  }
};

// The factor and offset of a pair's set, and its logit; `used` is false where the pair is in no set.
template <class A>
struct PairLogit {
  bool used, same;
  A k, o, z;

  __device__ PairLogit(const RowInfo<A>& row, const ColumnInfo<A>& column, const LogitArgs& args, A s)
      : same(row.label == column.label), k(same ? A(args.k_same) : A(args.k_different)),
        o(same ? A(args.o_same) : A(args.o_different)), z(logit(s, k * row.scale, o, column.bias)) {
    used = !row.ignored && !column.ignored && row.exclude != column.index && !(z == A(-INFINITY));
  }
};

}  // namespace dml::cuda
