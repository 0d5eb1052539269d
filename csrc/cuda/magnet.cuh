// What the forward and the backward of the Magnet loss share: the clusters of a batch, their centres, and the distances
// to these.
//
// A block takes 8 rows at a time and computes all the means that it compares them with, a chunk of columns at a time.
// That is cheap, because a batch has few rows.
#pragma once
#include "../core/online_lse.h"
#include "tiles.cuh"

namespace dml::cuda::magnet {

constexpr int most_rows = 512, most_slots = 512;
constexpr int rows_per_block = 8;

// What every block computes first: the clusters that take part, called slots, and the slot of each row.
struct Batch {
  int* slot_of;           // (N,) of each row, -1 where the row takes no part
  std::int64_t* classes;  // (slots,)
  int* source;            // (slots,) the cluster id of given centres, else the first row of the cluster
  int slots, counted;
};

__device__ inline bool counts(const MagnetArgs& args, std::int64_t cluster) {
  return cluster != args.ignore && cluster >= 0 && cluster < args.cluster_count && args.classes[cluster] != args.ignore;
}

// Numbers in order the i of [0, n) for which flag(i) is true; position[i] is the number of i. Returns how many there
// are. One warp calls it.
template <class Flag>
__device__ int number_flagged(int n, int* position, Flag flag) {
  int total = 0;
  for (int first = 0; first < n; first += warp_lanes) {
    const int i = first + int(threadIdx.x);
    const bool set = i < n && flag(i);
    const unsigned votes = __ballot_sync(every_lane, set);
    if (set) position[i] = total + __popc(votes & ((1u << threadIdx.x) - 1));
    total += __popc(votes);
  }
  return total;
}

// `scratch` (most_rows,) and `sizes` (2,) are in shared memory. Ends with a barrier.
__device__ inline void build(const MagnetArgs& args, Batch& batch, int* scratch, int* sizes) {
  const int n = int(args.x.rows);
  const bool given = args.centers.data;
  // For each row, the first row of its cluster, or the cluster itself where centres are given.
  for (int i = threadIdx.x; i < n; i += block_threads) {
    const std::int64_t cluster = args.clusters[i];
    int first = -1;
    if (counts(args, cluster)) {
      first = given ? int(cluster) : 0;
      while (!given && args.clusters[first] != cluster) ++first;
    }
    batch.slot_of[i] = first;
  }
  __syncthreads();
  if (threadIdx.x < warp_lanes) {
    const int slots =
        given ? number_flagged(int(args.cluster_count), scratch, [&](int k) { return args.classes[k] != args.ignore; })
              : number_flagged(n, scratch, [&](int i) { return batch.slot_of[i] == i; });
    int counted = 0;
    for (int i = threadIdx.x; i < n; i += warp_lanes) counted += batch.slot_of[i] >= 0;
    counted = warp_sum(counted);
    if (threadIdx.x == 0) sizes[0] = slots, sizes[1] = counted;
  }
  __syncthreads();
  const int candidates = given ? int(args.cluster_count) : n;
  for (int i = threadIdx.x; i < candidates; i += block_threads) {
    const bool is_slot = given ? args.classes[i] != args.ignore : batch.slot_of[i] == i;
    if (!is_slot) continue;
    batch.source[scratch[i]] = i;
    batch.classes[scratch[i]] = args.classes[given ? i : args.clusters[i]];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += block_threads)
    if (batch.slot_of[i] >= 0) batch.slot_of[i] = scratch[batch.slot_of[i]];
  batch.slots = sizes[0], batch.counted = sizes[1];
  __syncthreads();
}

inline std::int64_t slots_at_most(const MagnetArgs& args) {
  return args.centers.data || args.cluster_count < args.x.rows ? args.cluster_count : args.x.rows;
}

template <class A>
__device__ A unit_value(const MagnetArgs& args, const A* r, int i, std::int64_t k) {
  const A value = load<A>(args.x, i, k);
  return args.normalize ? value * r[i] : value;
}

// 1 / max(|x|, eps) of all rows; a warp takes a row.
template <class A>
__device__ void norms(const MagnetArgs& args, A* r) {
  const int lane = threadIdx.x % warp_lanes;
  for (int i = threadIdx.x / warp_lanes; i < args.x.rows; i += block_threads / warp_lanes) {
    A sum = 0;
    over_row<A>(args.x, i, [&](const auto& run) { sum += square(run); });
    bool unit;
    const A scale = inverse_norm(warp_sum(sum), A(args.eps), unit);
    if (lane == 0) r[i] = scale;
  }
}

// One thread computes column k of all centres, mu[slot * stride]. `sizes` are the numbers of rows in the clusters.
template <class A>
__device__ void centers_column(const MagnetArgs& args, const Batch& batch, const A* r, const int* sizes, std::int64_t k,
                               A* mu, int stride) {
  if (args.centers.data) {
    for (int slot = 0; slot < batch.slots; ++slot) mu[slot * stride] = load<A>(args.centers, batch.source[slot], k);
    return;
  }
  for (int slot = 0; slot < batch.slots; ++slot) mu[slot * stride] = 0;
  DML_UNROLL_BY(4)
  for (int i = 0; i < args.x.rows; ++i)
    if (batch.slot_of[i] >= 0) mu[batch.slot_of[i] * stride] += unit_value(args, r, i, k);
  for (int slot = 0; slot < batch.slots; ++slot) mu[slot * stride] /= A(sizes[slot]);
}

__device__ inline void count_rows(const Batch& batch, int n, int* sizes) {
  for (int slot = threadIdx.x; slot < batch.slots; slot += block_threads) {
    int size = 0;
    for (int i = 0; i < n; ++i) size += batch.slot_of[i] == slot;
    sizes[slot] = size;
  }
}

// The batch's scale 1 / (2 sigma^2) and its measured variance; the same in every thread and every block.
template <class A>
struct BatchVariance {
  double measured;
  bool floored;
  A scale;

  __device__ BatchVariance(const MagnetArgs& args, const Batch& batch, const A* distances, std::int64_t slots,
                           double* parts) {
    double sum = 0;
    for (int i = threadIdx.x; i < args.x.rows; i += block_threads)
      if (batch.slot_of[i] >= 0) sum += distances[i * slots + batch.slot_of[i]];
    measured = block_sum(sum, parts) / degrees(batch);
    if (args.variance.data) measured = load<A>(args.variance, 0, A(0));
    floored = !(measured > args.min_variance) && measured == measured;
    scale = A(0.5 / (floored ? args.min_variance : measured));
  }

  __device__ static double degrees(const Batch& batch) { return batch.counted > 2 ? batch.counted - 1 : 1; }
};

__device__ inline double weight_of(const MagnetArgs& args, const Batch& batch) {
  return args.reduction == Reduction::mean && batch.counted > 1 ? 1.0 / batch.counted : 1.0;
}

// Dynamic shared memory: r (N,), then what else a kernel needs. While distances are computed, that is the centres
// (slots, columns + 1) and the current rows (8, columns + 1).
template <class A>
struct Workspace {
  A *r, *rest;
  int columns;

  __device__ Workspace(unsigned char* dynamic, std::int64_t n, int columns)
      : r(reinterpret_cast<A*>(dynamic)), rest(r + n), columns(columns) {}
  // Usually odd, so that the same column of several centres is in different banks.
  __device__ int stride() const { return columns + 1; }
  __device__ A* centers() const { return rest; }
  __device__ A* rows(int slots) const { return rest + slots * stride(); }
};

// Loads columns [begin, begin + columns) of all centres; a thread takes a column. The caller provides the barriers
// around it.
template <class A>
__device__ void stage_centers(const MagnetArgs& args, const Batch& batch, const Workspace<A>& work, const int* sizes,
                              std::int64_t begin) {
  for (int c = threadIdx.x; c < work.columns && begin + c < args.x.cols; c += block_threads)
    centers_column(args, batch, work.r, sizes, begin + c, work.centers() + c, work.stride());
}

// Writes the squared distances of rows [8 group, 8 group + 8) to all centres; `distances` is (N, slots). Starts with a
// barrier.
template <class A>
__device__ void distances_of(const MagnetArgs& args, const Batch& batch, const Workspace<A>& work, const int* sizes,
                             int group, A* distances, std::int64_t slots) {
  const int n = int(args.x.rows), stride = work.stride();
  const int first = group * rows_per_block, rows = n - first < rows_per_block ? n - first : rows_per_block;
  const int pairs = rows * batch.slots;
  A *mu = work.centers(), *u = work.rows(batch.slots);
  for (std::int64_t begin = 0; begin < args.x.cols; begin += work.columns) {
    const int width = args.x.cols - begin < work.columns ? int(args.x.cols - begin) : work.columns;
    __syncthreads();  // norms and sizes are complete, the previous chunk has been read
    stage_centers(args, batch, work, sizes, begin);
    for (int c = threadIdx.x; c < width; c += block_threads)
      for (int row = 0; row < rows; ++row) u[row * stride + c] = unit_value(args, work.r, first + row, begin + c);
    __syncthreads();
    for (int pair = threadIdx.x; pair < pairs; pair += block_threads) {
      const int row = pair / batch.slots, slot = pair % batch.slots;
      A total = 0;
      for (int run = 0; run < width; run += run_length) {
        A part = 0;
        for (int c = run; c < run + run_length && c < width; ++c) {
          const A step = u[row * stride + c] - mu[slot * stride + c];
          part += step * step;
        }
        total += part;
      }
      A* to = distances + (first + row) * slots + slot;  // only this thread writes it, chunk after chunk
      *to = begin == 0 ? total : *to + total;
    }
  }
}

#define DML_BATCH(batch)                                 \
  DML_SHARED(int, slot_of, most_rows);                   \
  DML_SHARED(std::int64_t, classes, most_slots);         \
  DML_SHARED(int, source, most_slots);                   \
  DML_SHARED(int, numbers, most_rows);                   \
  DML_SHARED(int, batch_sizes, 2);                       \
  DML_SHARED(double, parts, block_threads / warp_lanes); \
  Batch batch{slot_of, classes, source, 0, 0};           \
  build(args, batch, numbers, batch_sizes)

constexpr std::int64_t static_shared = 16384;

// The columns of a chunk: as many as fit into what is left of shared memory, at most the threads of a block.
template <class A>
int columns_for(std::int64_t n, std::int64_t slots) {
  const std::int64_t rest = (3 * n + slots) * sizeof(A), room = 101376 - static_shared - rest;
  const std::int64_t columns = room / std::int64_t((slots + rows_per_block) * sizeof(A)) - 1;
  return int(columns >= block_threads ? block_threads : columns / 8 * 8);
}

// Bytes of dynamic shared memory while distances are computed.
template <class A>
std::size_t distances_bytes(std::int64_t n, std::int64_t slots, int columns) {
  return (n + (slots + rows_per_block) * (columns + 1)) * sizeof(A);
}

inline unsigned groups_of(std::int64_t n) { return unsigned((n + rows_per_block - 1) / rows_per_block); }

}  // namespace dml::cuda::magnet
