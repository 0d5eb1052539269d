// The whole N x M matrix of similarities or distances, and its gradient.
#include "gradients.cuh"

namespace dml::cuda {
namespace {

constexpr int owned_count = 2, other_count = 2;
constexpr int rows_per_block = owned_count * owned_lanes, columns_per_block = other_count * other_lanes;

// A block computes a tile of the matrix, 16 rows by 32 columns.
template <class A, bool difference>
__global__ void __launch_bounds__(block_threads, 4)
    forward_kernel(const __grid_constant__ Comparison comparison, const __grid_constant__ Target out,
                   const Chunks chunks, const std::int64_t column_blocks) {
  DML_DYNAMIC_SHARED(memory);
  DML_SHARED(A, row_norms, rows_per_block);
  DML_SHARED(A, column_norms, columns_per_block);
  A* staged = reinterpret_cast<A*>(memory);
  const A eps = A(comparison.eps);
  Side<A> rows{comparison.x, staged, row_norms, rows_per_block, comparison.normalize, eps};
  Side<A> columns{comparison.w,         staged + rows_per_block * chunks.stride(),
                  column_norms,         columns_per_block,
                  comparison.normalize, eps};
  const std::int64_t row_first = blockIdx.x / column_blocks * rows_per_block;
  const std::int64_t column_first = blockIdx.x % column_blocks * columns_per_block;
  rows.prepare(row_first, chunks);
  columns.prepare(column_first, chunks);
  __syncthreads();
  A sums[owned_count][other_count];
  pair_sums<A, difference>(rows, row_first, columns, column_first, chunks, sums);
  const int tx = threadIdx.x % other_lanes, ty = threadIdx.x / other_lanes;
  const std::int64_t n = comparison.x.rows, m = comparison.w.rows;
  DML_UNROLL
  for (int i = 0; i < owned_count; ++i) {
    DML_UNROLL
    for (int j = 0; j < other_count; ++j) {
      const std::int64_t row = row_first + ty + owned_lanes * i, column = column_first + tx + other_lanes * j;
      const A s = score(comparison.metric, sums[i][j]);
      if (row < n && column < m) store(out.data, out.dtype, row * m + column, difference ? -s : s);
    }
  }
}

template <class A>
struct MatrixWeights {
  Matrix grad;
  Target x, w;

  struct Extra {
    __device__ Extra(const MatrixWeights&, const Comparison&, double*) {}
    __device__ void merge() {}
  };

  __device__ Target targets_x() const { return x; }
  __device__ Target targets_w() const { return w; }

  __device__ A pair(const Comparison& comparison, std::int64_t i, std::int64_t j, A raw, Extra&) const {
    const A g = load<A>(grad, i, j);
    if (comparison.metric == Metric::dot) return g;
    return comparison.metric == Metric::sqeuclidean ? -g : -g * root_slope(score(comparison.metric, raw));
  }

  __device__ void write(const Extra&, bool, std::int64_t) const {}
};

}  // namespace

Failure distance_forward(const Comparison& comparison, Target out, Stream stream) {
  if (comparison.x.rows == 0) return nullptr;
  return with_accumulation(comparison.wide, [&](auto zero) -> Failure {
    using A = decltype(zero);
    constexpr int staged_rows = rows_per_block + columns_per_block;
    const auto blocks = [](std::int64_t n, int size) { return (n + size - 1) / size; };
    const std::int64_t row_blocks = blocks(comparison.x.rows, rows_per_block);
    const std::int64_t column_blocks = blocks(comparison.w.rows, columns_per_block);
    if (row_blocks > 0x7fffffff / column_blocks) return "the distance matrix has more tiles than a grid has blocks";
    const Chunks chunks = chunks_of<A>(comparison.x.cols, staged_rows, shared_limit() - 1024);
    const std::size_t bytes = staged_rows * (chunks.size + row_pad) * sizeof(A);
    const auto kernel = comparison.metric == Metric::dot ? forward_kernel<A, false> : forward_kernel<A, true>;
    if (const Failure failure = allow_shared(kernel, bytes)) return failure;
    DML_LAUNCH(kernel, unsigned(row_blocks * column_blocks), block_threads, bytes, static_cast<cudaStream_t>(stream),
               comparison, out, chunks, column_blocks);
    return launch_failure();
  });
}

Failure distance_backward(const Comparison& comparison, const Matrix& grad, Target grad_x, Target grad_w, void* scratch,
                          Stream stream) {
  const auto blocks = gradients::blocks_of(comparison, grad_x.data, grad_w.data);
  return with_accumulation(comparison.wide, [&](auto zero) {
    using A = decltype(zero);
    return gradients::launch<A>(comparison, MatrixWeights<A>{grad, grad_x, grad_w}, blocks, scratch, stream);
  });
}

}  // namespace dml::cuda
