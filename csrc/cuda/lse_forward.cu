// The forward of masked_logsumexp. A block takes 16 rows and a slice of the bank, 32 entries at a time; each thread
// keeps the running log-sum-exps of its pairs, which are merged over the 16 threads of a row at the end of the slice.
// With several slices the last block merges them in order. It also reduces a Proxy-NCA loss to its scalar, so that the
// loss is one launch.
#include "../core/online_lse.h"
#include "last_block.cuh"
#include "proxy_nca.cuh"
#include "tiles.cuh"

namespace dml::cuda {
namespace {

constexpr int owned_count = 2, other_count = 2;
constexpr int rows_per_block = owned_count * owned_lanes, columns_per_tile = other_count * other_lanes;
constexpr int part_values = 6;  // doubles of a row in a slice: maximum and sum of each set, and the sums of logits

struct Plan {
  std::int64_t row_blocks, slices, tiles;
};

// As many slices as give every multiprocessor two blocks, but no more than there are tiles. The number is fixed for a
// shape on a device.
Plan plan_of(std::int64_t n, std::int64_t m) {
  Plan plan{(n + rows_per_block - 1) / rows_per_block, 1, (m + columns_per_tile - 1) / columns_per_tile};
  const std::int64_t wanted = 2 * processors() / plan.row_blocks;
  plan.slices = wanted < 1 ? 1 : wanted > plan.tiles ? plan.tiles : wanted;
  // The last block reads all parts, which for more slices would take longer than they save.
  if (plan.slices > 32) plan.slices = 32;
  return plan;
}

template <class A>
struct RowState {
  OnlineLse<A, A> same, different;
  double sum_same = 0, sum_different = 0;

  __device__ void add(const PairLogit<A>& pair) {
    if (!pair.used) return;
    // To choose one of the two by reference would put both into memory.
    same.add(pair.z, pair.same), different.add(pair.z, !pair.same);
    sum_same += pair.same ? pair.z : A(0), sum_different += pair.same ? A(0) : pair.z;
  }

  __device__ void add(const RowState& other) {
    same.add(other.same), different.add(other.different);
    sum_same += other.sum_same, sum_different += other.sum_different;
  }

  // Merges the states of the 16 threads of a row, in pairs.
  __device__ void merge() {
    for (int bits = other_lanes / 2; bits; bits /= 2) {
      RowState other;
      merge_from(other.same, same, bits), merge_from(other.different, different, bits);
      other.sum_same = __shfl_xor_sync(every_lane, sum_same, bits);
      other.sum_different = __shfl_xor_sync(every_lane, sum_different, bits);
      add(other);
    }
  }

  __device__ void write(double* part) const {
    part[0] = same.max, part[1] = same.sum, part[2] = different.max, part[3] = different.sum;
    part[4] = sum_same, part[5] = sum_different;
  }

  __device__ static RowState read(const double* part) {
    RowState state;
    state.same.max = A(part[0]), state.same.sum = part[1];
    state.different.max = A(part[2]), state.different.sum = part[3];
    state.sum_same = part[4], state.sum_different = part[5];
    return state;
  }

  __device__ void write(const LseOut& out, std::int64_t i) const {
    static_cast<A*>(out.same)[i] = same.value();
    static_cast<A*>(out.different)[i] = different.value();
    if (!out.sum_same) return;
    static_cast<A*>(out.sum_same)[i] = A(sum_same);
    static_cast<A*>(out.sum_different)[i] = A(sum_different);
  }

 private:
  __device__ static void merge_from(OnlineLse<A, A>& to, const OnlineLse<A, A>& from, int bits) {
    to.max = __shfl_xor_sync(every_lane, from.max, bits);
    to.sum = __shfl_xor_sync(every_lane, from.sum, bits);
  }
};

// In the last block: merges the slices of each row, computes the losses of the rows, and sums them in a fixed order.
template <class A>
__device__ void finish(const Labels& labels, const LseOut& out, const ProxyNca& loss, std::int64_t n, std::int64_t m,
                       const double* parts) {
  DML_SHARED(double, warp_parts, block_threads / warp_lanes);
  const A divisor = loss.wanted ? proxy_nca_divisor<A>(loss, labels, n, warp_parts) : A(1);
  double total = 0;
  for (std::int64_t i = threadIdx.x; i < n; i += block_threads) {
    if (gridDim.y > 1) {
      RowState<A> state;
      for (unsigned slice = 0; slice < gridDim.y; ++slice)
        state.add(RowState<A>::read(parts + (slice * n + i) * part_values));
      state.write(out, i);
    }
    if (!loss.wanted) continue;
    A row = 0;
    if (labels.y[i] != labels.ignore) {
      const A same = static_cast<A*>(out.same)[i];
      row = proxy_nca_row(loss, same, static_cast<A*>(out.different)[i]);
      if (loss.smoothing > 0) {
        const A sum = static_cast<A*>(out.sum_same)[i] + static_cast<A*>(out.sum_different)[i];
        row += A(loss.smoothing) * (same - sum / A(m));
      }
      row *= load<A>(loss.weight, i, A(1)) / divisor;
    }
    if (loss.reduction == Reduction::none) static_cast<A*>(loss.value)[i] = row;
    total += row;
  }
  if (!loss.wanted || loss.reduction == Reduction::none) return;
  total = block_sum(total, warp_parts);
  if (threadIdx.x == 0) *static_cast<A*>(loss.value) = A(total);
}

template <class A, bool difference>
__global__ void __launch_bounds__(block_threads, std::is_same_v<A, double> ? 3 : 4)
    forward_kernel(const __grid_constant__ Comparison comparison, const __grid_constant__ Labels labels,
                   const __grid_constant__ LogitArgs args, const __grid_constant__ LseOut out,
                   const __grid_constant__ ProxyNca loss, const Chunks chunks, const std::int64_t tiles, double* parts,
                   const unsigned ticket) {
  DML_DYNAMIC_SHARED(memory);
  DML_SHARED(A, row_norms, rows_per_block);
  DML_SHARED(A, column_norms, columns_per_tile);
  DML_SHARED(bool, last, 1);
  const A eps = A(comparison.eps);
  A* staged = reinterpret_cast<A*>(memory);
  Side<A> rows{comparison.x, staged, row_norms, rows_per_block, comparison.normalize, eps};
  Side<A> columns{comparison.w,         staged + rows_per_block * chunks.stride(),
                  column_norms,         columns_per_tile,
                  comparison.normalize, eps};
  const int tx = threadIdx.x % other_lanes, ty = threadIdx.x / other_lanes;
  const std::int64_t n = comparison.x.rows, m = comparison.w.rows;
  const std::int64_t row_first = std::int64_t(blockIdx.x) * rows_per_block;
  rows.prepare(row_first, chunks);

  RowState<A> states[owned_count];
  const std::int64_t end = (blockIdx.y + 1) * tiles / gridDim.y;
  for (std::int64_t tile = blockIdx.y * tiles / gridDim.y; tile < end; ++tile) {
    const std::int64_t column_first = tile * columns_per_tile;
    __syncthreads();  // the previous tile has been read
    columns.prepare(column_first, chunks);
    __syncthreads();
    A sums[owned_count][other_count];
    pair_sums<A, difference>(rows, row_first, columns, column_first, chunks, sums);
    DML_UNROLL
    for (int j = 0; j < other_count; ++j) {
      const ColumnInfo<A> column(labels, args, column_first + tx + other_lanes * j, m);
      DML_UNROLL
      for (int i = 0; i < owned_count; ++i) {
        const RowInfo<A> row(labels, args, row_first + ty + owned_lanes * i, n);
        states[i].add(PairLogit<A>(row, column, args, score(comparison.metric, sums[i][j])));
      }
    }
  }
  DML_UNROLL
  for (int i = 0; i < owned_count; ++i) {
    states[i].merge();
    const std::int64_t row = row_first + ty + owned_lanes * i;
    if (tx != 0 || row >= n) continue;
    if (gridDim.y == 1)
      states[i].write(out, row);
    else
      states[i].write(parts + (std::int64_t(blockIdx.y) * n + row) * part_values);
  }
  if (gridDim.y == 1 && !loss.wanted) return;
  if (arrive_last(ticket, gridDim.x * gridDim.y, last)) finish<A>(labels, out, loss, n, m, parts);
}

}  // namespace

std::size_t lse_forward_bytes(std::int64_t n, std::int64_t m) {
  if (n == 0) return 0;
  const Plan plan = plan_of(n, m);
  return plan.slices > 1 ? plan.slices * n * part_values * sizeof(double) : 0;
}

Failure lse_forward(const Comparison& comparison, const Labels& labels, const LogitArgs& args, const LseOut& out,
                    const ProxyNca& loss, void* scratch, Stream stream) {
  if (comparison.x.rows == 0) return "lse_forward needs at least one row";
  return with_accumulation(comparison.wide, [&](auto zero) -> Failure {
    using A = decltype(zero);
    const Plan plan = plan_of(comparison.x.rows, comparison.w.rows);
    const Chunks chunks = chunks_of<A>(comparison.x.cols, rows_per_block + columns_per_tile, shared_limit() - 1024);
    const std::size_t bytes = (rows_per_block + columns_per_tile) * (chunks.size + row_pad) * sizeof(A);
    const auto kernel = comparison.metric == Metric::dot ? forward_kernel<A, false> : forward_kernel<A, true>;
    if (const Failure failure = allow_shared(kernel, bytes)) return failure;
    DML_LAUNCH(kernel, dim3(unsigned(plan.row_blocks), unsigned(plan.slices)), block_threads, bytes,
               static_cast<cudaStream_t>(stream), comparison, labels, args, out, loss, chunks, plan.tiles,
               static_cast<double*>(scratch), take_ticket(stream));
    return launch_failure();
  });
}

}  // namespace dml::cuda
