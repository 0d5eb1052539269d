// Gradients of both sides in one launch without atomics: a block owns 8 rows of x, or 8 of the bank, walks all of the
// other side, recomputes the scores tile by tile, and sums the gradients of the rows that it owns in order.
//
// For products e_ij is the gradient of the raw product, and that of u_i is sum_j e_ij p_j. For distances e_ij is -2
// times the gradient of -|u - p|^2, and that of u_i is sum_j e_ij (u_i - p_j). The gradient of x_i follows by
// projection. The bank's side is the same with the roles swapped.
//
// In float the sums over tiles are added with Kahan's compensation. The projection cancels most of the sum, by a factor
// of 60 for 5,000 random entries, so the rounding of one addition for each tile would show.
#pragma once
#include "tiles.cuh"

namespace dml::cuda {
namespace gradients {

constexpr int other_count = 2;
constexpr int owned_rows = owned_lanes, other_rows = other_count * other_lanes;
constexpr int staged_rows = owned_rows + other_rows;

// Rows of memory for the sums of the owned rows: the sums and, in float, the rounding error of each.
template <class A>
constexpr int sum_rows = std::is_same_v<A, double> ? owned_rows : 2 * owned_rows;

// The number of blocks for each side; 0 where no gradient of the side is wanted.
struct Blocks {
  std::int64_t rows, columns;
};

inline Blocks blocks_of(const Comparison& comparison, bool rows, bool columns) {
  const auto count = [](std::int64_t n) { return (n + owned_rows - 1) / owned_rows; };
  return {rows ? count(comparison.x.rows) : 0, columns ? count(comparison.w.rows) : 0};
}

template <class A>
Chunks chunks_for(std::int64_t d) {
  return chunks_of<A>(d, staged_rows + sum_rows<A>, shared_limit() - 4096);
}

inline std::size_t scratch_bytes(const Comparison& comparison) {
  const std::int64_t d = comparison.x.cols;
  const bool whole = comparison.wide ? chunks_for<double>(d).whole : chunks_for<float>(d).whole;
  const Blocks blocks = blocks_of(comparison, true, true);
  const std::size_t row_bytes = comparison.wide ? sum_rows<double> * sizeof(double) : sum_rows<float> * sizeof(float);
  return whole ? 0 : (blocks.rows + blocks.columns) * row_bytes * d;
}

// sum += value, where `error` is the rounding error of the sum so far.
template <class A>
__device__ __forceinline__ void add_compensated(A& sum, A& error, A value) {
  value -= error;
  const A total = sum + value;
  error = (total - sum) - value;
  sum = total;
}

// Adds e (other, owned) times the other side's rows to the sums (sum_rows, D). One thread computes each element.
template <class A, bool difference>
__device__ void accumulate(const Side<A>& owned, std::int64_t owned_first, const Side<A>& other,
                           std::int64_t other_first, Chunks chunks, const Quad<A>* e, A* sums, std::int64_t stride) {
  const std::int64_t left = other.matrix.rows - other_first;
  const int count = left < other.rows ? int(left) : other.rows;
  for (std::int64_t k = threadIdx.x; k < owned.matrix.cols; k += block_threads) {
    A u[owned_rows], g[owned_rows];
    DML_UNROLL
    for (int n = 0; n < owned_rows; ++n) {
      g[n] = 0, u[n] = 0;
      if (difference && owned_first + n < owned.matrix.rows) u[n] = owned.value(owned_first, n, k, chunks);
    }
    DML_UNROLL_BY(2)
    for (int j = 0; j < count; ++j) {
      const A p = other.value(other_first, j, k, chunks);
      DML_UNROLL
      for (int half = 0; half < owned_rows / 4; ++half) {
        const Quad<A> weights = e[j * (owned_rows / 4) + half];
        DML_UNROLL
        for (int n = 0; n < 4; ++n) g[half * 4 + n] += weights.v[n] * (difference ? u[half * 4 + n] - p : p);
      }
    }
    DML_UNROLL
    for (int n = 0; n < owned_rows; ++n) {
      if constexpr (sum_rows<A> == owned_rows)
        sums[n * stride + k] += g[n];
      else
        add_compensated(sums[n * stride + k], sums[(owned_rows + n) * stride + k], g[n]);
    }
  }
}

// Turns the gradients of unit vectors into those of the rows as they came, and writes them. A warp takes a row.
template <class A>
__device__ void write(const Side<A>& owned, std::int64_t first, Chunks chunks, const A* sums, std::int64_t stride,
                      Target target) {
  const std::int64_t d = owned.matrix.cols;
  const int lane = threadIdx.x % warp_lanes;
  for (int n = threadIdx.x / warp_lanes; n < owned_rows; n += block_threads / warp_lanes) {
    if (first + n >= owned.matrix.rows) break;
    A along = 0, norm = 1;
    if (owned.normalize) {
      norm = owned.norms[n];
      if (!(norm == owned.eps))  // else shorter than eps, where the norm is a constant
        for (std::int64_t k = lane; k < d; k += warp_lanes)
          along += sums[n * stride + k] * owned.value(first, n, k, chunks);
      along = warp_sum(along);
    }
    for (std::int64_t k = lane; k < d; k += warp_lanes) {
      A g = sums[n * stride + k];
      if (owned.normalize) g = (g - along * owned.value(first, n, k, chunks)) / norm;
      store(target.data, target.dtype, (first + n) * d + k, g);
    }
  }
}

// Weights::pair(comparison, i, j, raw sum, extra) returns the gradient of a pair's score. Extra sums what else the
// owned side gets from its pairs, and holds what a block computes beforehand.
template <class A, bool difference, class Weights>
__global__ void __launch_bounds__(block_threads, std::is_same_v<A, double> ? 3 : 4)
    kernel(const __grid_constant__ Comparison comparison, const __grid_constant__ Weights weights, const Chunks chunks,
           const Blocks blocks, A* scratch) {
  DML_DYNAMIC_SHARED(memory);
  DML_SHARED(double, warp_parts, block_threads / warp_lanes);
  DML_SHARED(A, owned_norms, owned_rows);
  DML_SHARED(A, other_norms, other_rows);
  DML_SHARED(Quad<A>, e, other_rows * owned_rows / 4);
  const bool owns_rows = blockIdx.x < blocks.rows;
  const std::int64_t block = owns_rows ? blockIdx.x : blockIdx.x - blocks.rows, owned_first = block * owned_rows;
  const A eps = A(comparison.eps);
  A* staged = reinterpret_cast<A*>(memory);
  Side<A> owned{owns_rows ? comparison.x : comparison.w, staged, owned_norms, owned_rows, comparison.normalize, eps};
  Side<A> other{owns_rows ? comparison.w : comparison.x,
                staged + owned_rows * chunks.stride(),
                other_norms,
                other_rows,
                comparison.normalize,
                eps};
  const Target target = owns_rows ? weights.targets_x() : weights.targets_w();
  const std::int64_t d = comparison.x.cols, stride = chunks.whole ? chunks.stride() : d;
  A* sums =
      chunks.whole ? staged + staged_rows * chunks.stride() : scratch + std::int64_t(blockIdx.x) * sum_rows<A> * d;
  const int tx = threadIdx.x % other_lanes, ty = threadIdx.x / other_lanes;

  owned.prepare(owned_first, chunks);
  if (target.data)
    for (std::int64_t k = threadIdx.x; k < d; k += block_threads)
      for (int n = 0; n < sum_rows<A>; ++n) sums[n * stride + k] = 0;
  typename Weights::Extra extra(weights, comparison, warp_parts);
  for (std::int64_t first = 0; first < other.matrix.rows; first += other_rows) {
    __syncthreads();  // the previous tile has been read
    other.prepare(first, chunks);
    __syncthreads();
    A raw[1][other_count];
    pair_sums<A, difference>(owned, owned_first, other, first, chunks, raw);
    DML_UNROLL
    for (int m = 0; m < other_count; ++m) {
      const int j = tx + other_lanes * m;
      const std::int64_t owned_row = owned_first + ty, other_row = first + j;
      A ds = 0;
      if (owned_row < owned.matrix.rows && other_row < other.matrix.rows)
        ds = owns_rows ? weights.pair(comparison, owned_row, other_row, raw[0][m], extra)
                       : weights.pair(comparison, other_row, owned_row, raw[0][m], extra);
      reinterpret_cast<A*>(e)[j * owned_rows + ty] = difference ? -2 * ds : ds;
    }
    if (!target.data) continue;
    __syncthreads();
    accumulate<A, difference>(owned, owned_first, other, first, chunks, e, sums, stride);
  }
  extra.merge();
  if (tx == 0 && owned_first + ty < owned.matrix.rows) weights.write(extra, owns_rows, owned_first + ty);
  __syncthreads();
  if (target.data) write(owned, owned_first, chunks, sums, stride, target);
}

template <class A, class Weights>
Failure launch(const Comparison& comparison, const Weights& weights, Blocks blocks, void* scratch, Stream stream) {
  if (blocks.rows + blocks.columns == 0) return nullptr;
  const Chunks chunks = chunks_for<A>(comparison.x.cols);
  const std::size_t bytes = (staged_rows + sum_rows<A>)*(chunks.size + row_pad) * sizeof(A);
  const auto function = comparison.metric == Metric::dot ? kernel<A, false, Weights> : kernel<A, true, Weights>;
  if (const Failure failure = allow_shared(function, bytes)) return failure;
  DML_LAUNCH(function, unsigned(blocks.rows + blocks.columns), block_threads, bytes, static_cast<cudaStream_t>(stream),
             comparison, weights, chunks, blocks, static_cast<A*>(scratch));
  return launch_failure();
}

}  // namespace gradients
}  // namespace dml::cuda
