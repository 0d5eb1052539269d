// The Magnet loss of a batch. Forward, one launch: a block takes 8 rows, makes the means it compares them with (all of
// them, a chunk of columns at a time: rows are few) and writes the squared distances; the last block makes variance,
// log-sum-exps, hinge and sum of them. Backward, two launches: the distances again, then a block for each cluster.
#include "../core/online_lse.h"
#include "last_block.cuh"
#include "tiles.cuh"

namespace dml::cuda {
namespace {

constexpr int most_rows = 512, most_slots = 512;
constexpr int rows_per_block = 8;

// What every block works out first: the clusters that take part ("slots"), and each row's.
struct Batch {
  int* slot_of;           // (N,) of each row, -1 where the row takes no part
  std::int64_t* classes;  // (slots,)
  int* source;            // (slots,) the cluster id of given centres, else the first row of the cluster
  int slots, counted;
};

__device__ bool counts(const MagnetArgs& args, std::int64_t cluster) {
  return cluster != args.ignore && cluster >= 0 && cluster < args.cluster_count && args.classes[cluster] != args.ignore;
}

// Numbers the set flags of [0, n) in order: position[i] where flag(i), in one warp. Returns how many there are.
template <class Flag>
__device__ int number(int n, int* position, Flag flag) {
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

// `scratch`, `sizes`: shared, (most_rows,) and (2,). Ends with a barrier.
__device__ void build(const MagnetArgs& args, Batch& batch, int* scratch, int* sizes) {
  const int n = int(args.x.rows);
  const bool given = args.centers.data;
  // The first row of each row's cluster, or the cluster itself.
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
        given ? number(int(args.cluster_count), scratch, [&](int k) { return args.classes[k] != args.ignore; })
              : number(n, scratch, [&](int i) { return batch.slot_of[i] == i; });
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

// Scratch memory: r (N,), distances (N, slots), gradients of rows (N, D).
template <class A>
struct Memory {
  A *r, *distances, *rows;

  Memory(void* at, std::int64_t n, std::int64_t slots)
      : r(static_cast<A*>(at)), distances(r + n), rows(distances + n * slots) {}
};

std::int64_t slots_at_most(const MagnetArgs& args) {
  return args.centers.data || args.cluster_count < args.x.rows ? args.cluster_count : args.x.rows;
}

template <class A>
__device__ A unit_value(const MagnetArgs& args, const A* r, int i, std::int64_t k) {
  const A value = load<A>(args.x, i, k);
  return args.normalize ? value * r[i] : value;
}

// 1 / max(|x|, eps) of all rows; a warp a row.
template <class A>
__device__ void norms(const MagnetArgs& args, A* r) {
  const int lane = threadIdx.x % warp_lanes;
  for (int i = threadIdx.x / warp_lanes; i < args.x.rows; i += block_threads / warp_lanes) {
    A sum = 0;
    for (std::int64_t k = lane * 4; k < args.x.cols; k += warp_lanes * 4) sum += square(load_quad<A>(args.x, i, k));
    bool unit;
    const A scale = inverse_norm(warp_sum(sum), A(args.eps), unit);
    if (lane == 0) r[i] = scale;
  }
}

// Column k of the centres, mu[slot * stride], by one thread; `sizes` are the clusters' rows.
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

__device__ void count_rows(const Batch& batch, int n, int* sizes) {
  for (int slot = threadIdx.x; slot < batch.slots; slot += block_threads) {
    int size = 0;
    for (int i = 0; i < n; ++i) size += batch.slot_of[i] == slot;
    sizes[slot] = size;
  }
}

// The batch's scale 1 / (2 sigma^2) and its measured variance; the same in every thread and every block.
template <class A>
struct Spread {
  double measured;
  bool floored;
  A scale;

  __device__ Spread(const MagnetArgs& args, const Batch& batch, const A* distances, std::int64_t slots, double* parts) {
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

__device__ double weight_of(const MagnetArgs& args, const Batch& batch) {
  return args.reduction == Reduction::mean && batch.counted > 1 ? 1.0 / batch.counted : 1.0;
}

// In the last block: a thread a row.
template <class A>
__device__ void finish(const MagnetArgs& args, const MagnetOut& out, const Batch& batch, const A* distances,
                       std::int64_t slots, double* parts) {
  const Spread<A> spread(args, batch, distances, slots, parts);
  double total = 0;
  for (int i = threadIdx.x; i < args.x.rows; i += block_threads) {
    OnlineLse<A, A> different;
    A kept = 0;
    if (const int own = batch.slot_of[i]; own >= 0) {
      for (int slot = 0; slot < batch.slots; ++slot)
        if (batch.classes[slot] != batch.classes[own]) {
          const A z = -spread.scale * distances[i * slots + slot];
          if (!(z == A(-INFINITY))) different.add(z, 1);
        }
      const A hinge = A(args.alpha) + spread.scale * distances[i * slots + own] + different.value();
      kept = hinge <= A(0) ? A(0) : hinge;  // NaN stays
    }
    static_cast<A*>(out.different)[i] = different.value();
    if (args.reduction == Reduction::none) static_cast<A*>(out.value)[i] = kept;
    total += kept;
  }
  total = block_sum(total, parts);
  if (threadIdx.x != 0) return;
  *static_cast<A*>(out.variance) = A(spread.measured);
  if (args.reduction != Reduction::none) *static_cast<A*>(out.value) = A(total * weight_of(args, batch));
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

// Dynamic shared memory: centres (slots, columns + 1), the block's rows (8, columns + 1), r (N,).
template <class A, bool whole_loss>
__global__ void __launch_bounds__(block_threads, 4)
    distances_kernel(const __grid_constant__ MagnetArgs args, const __grid_constant__ MagnetOut out,
                     const Memory<A> memory, const int columns, const std::int64_t slots, const unsigned ticket) {
  DML_DYNAMIC_SHARED(dynamic);
  DML_SHARED(int, sizes, most_slots);
  DML_SHARED(bool, last, 1);
  DML_BATCH(batch);
  const int n = int(args.x.rows), stride = columns + 1;
  A *mu = reinterpret_cast<A*>(dynamic), *u = mu + slots * stride, *r = u + rows_per_block * stride;
  const int first = blockIdx.x * rows_per_block, rows = n - first < rows_per_block ? n - first : rows_per_block;
  if (args.normalize) norms(args, r);
  count_rows(batch, n, sizes);
  const int pairs = rows * batch.slots;
  for (std::int64_t begin = 0; begin < args.x.cols; begin += columns) {
    __syncthreads();  // norms and sizes are there, the chunk before has been read
    for (int c = threadIdx.x; c < columns; c += block_threads) {
      if (begin + c < args.x.cols) centers_column(args, batch, r, sizes, begin + c, mu + c, stride);
      for (int row = 0; row < rows; ++row)
        u[row * stride + c] = begin + c < args.x.cols ? unit_value(args, r, first + row, begin + c) : A(0);
    }
    __syncthreads();
    const int width = args.x.cols - begin < columns ? int(args.x.cols - begin) : columns;
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
      A* to = memory.distances + (first + row) * slots + slot;  // this thread's own, chunk after chunk
      *to = begin == 0 ? total : *to + total;
    }
  }
  if (args.normalize && int(threadIdx.x) < rows) memory.r[first + threadIdx.x] = r[first + threadIdx.x];
  if constexpr (whole_loss) {
    if (arrive_last(ticket, gridDim.x, last)) finish(args, out, batch, memory.distances, slots, parts);
  }
}

// The gradient of the distance between a row and a slot's centre, from the hinge's gradient g of the row.
template <class A>
struct Slopes {
  A scale, per_distance;  // per_distance: through the variance, of every own distance

  __device__ A own(A g) const { return g * scale + per_distance; }
  __device__ A other(A g, A distance, A lse) const {
    return lse == A(-INFINITY) ? A(0) : -scale * g * exp(-scale * distance - lse);
  }
};

// Block `slot` makes the gradient of its centre and of its rows; the block after the last zeroes rows that take no part.
// Dynamic shared memory: centres (slots, columns), factors of all rows for this centre (N,), hinge gradients (N,),
// factors of all centres for one row (slots,).
template <class A>
__global__ void __launch_bounds__(block_threads, 4)
    gradients_kernel(const __grid_constant__ MagnetArgs args, const Vector grad, const A* different,
                     const __grid_constant__ MagnetTargets targets, const Memory<A> memory, const int columns,
                     const std::int64_t slots) {
  DML_DYNAMIC_SHARED(dynamic);
  DML_SHARED(int, sizes, most_slots);
  DML_BATCH(batch);
  const int n = int(args.x.rows), lane = threadIdx.x % warp_lanes, mine = blockIdx.x;
  const std::int64_t d = args.x.cols;
  A *mu = reinterpret_cast<A*>(dynamic), *factors = mu + slots * columns, *g = factors + n, *row_factors = g + n;
  const A* distances = memory.distances;
  const bool given = args.centers.data;
  count_rows(batch, n, sizes);
  const Spread<A> spread(args, batch, distances, slots, parts);

  // Every block: the hinges' gradients, and from all pairs the variance's.
  double grad_scale = 0;
  for (int i = threadIdx.x; i < n; i += block_threads) {
    const int own = batch.slot_of[i];
    g[i] = 0;
    if (own < 0) continue;
    const A own_distance = distances[i * slots + own], lse = different[i];
    if (A(args.alpha) + spread.scale * own_distance + lse <= A(0)) continue;
    g[i] = load<A>(grad, i, A(0)) * A(weight_of(args, batch));
    grad_scale += double(g[i]) * own_distance;
    if (lse == A(-INFINITY)) continue;
    for (int slot = 0; slot < batch.slots; ++slot)
      if (batch.classes[slot] != batch.classes[own]) {
        const A distance = distances[i * slots + slot];
        grad_scale -= double(g[i]) * exp(-spread.scale * distance - lse) * distance;
      }
  }
  grad_scale = block_sum(grad_scale, parts);  // its barriers make g and sizes known, too
  const double grad_variance = spread.floored ? 0 : -2 * double(spread.scale) * double(spread.scale) * grad_scale;
  const Slopes<A> slopes{spread.scale, A(args.variance.data ? 0 : grad_variance / Spread<A>::degrees(batch))};
  if (mine == 0 && threadIdx.x == 0 && targets.variance.data)
    store(targets.variance.data, targets.variance.dtype, 0, A(grad_variance));

  if (mine >= batch.slots) {
    if (mine + 1 < int(gridDim.x)) return;
    for (std::int64_t k = threadIdx.x; k < d; k += block_threads) {
      for (int i = 0; i < n; ++i)
        if (batch.slot_of[i] < 0 && targets.x.data) store(targets.x.data, targets.x.dtype, i * d + k, A(0));
      for (int id = 0; given && targets.centers.data && id < args.cluster_count; ++id)
        if (args.classes[id] == args.ignore) store(targets.centers.data, targets.centers.dtype, id * d + k, A(0));
    }
    return;
  }

  // The distance of row i to this centre moves the centre by -2 factor (u - mu).
  for (int i = threadIdx.x; i < n; i += block_threads) {
    const int own = batch.slot_of[i];
    A factor = 0;
    if (own == mine)
      factor = slopes.own(g[i]);
    else if (own >= 0 && batch.classes[own] != batch.classes[mine])
      factor = slopes.other(g[i], distances[i * slots + mine], different[i]);
    factors[i] = factor;
  }
  for (std::int64_t begin = 0; begin < d; begin += columns) {
    const std::int64_t k = begin + threadIdx.x;  // columns is at most the block's threads
    const bool inside = int(threadIdx.x) < columns && k < d;
    A* mu_column = mu + threadIdx.x;
    A grad_mu = 0;
    __syncthreads();  // factors are there; row factors of the chunk before have been read
    if (inside) {
      centers_column(args, batch, memory.r, sizes, k, mu_column, columns);
      const A center = mu_column[mine * columns];
      for (int i = 0; i < n; ++i)
        if (batch.slot_of[i] >= 0) grad_mu -= 2 * factors[i] * (unit_value(args, memory.r, i, k) - center);
      if (given && targets.centers.data)
        store(targets.centers.data, targets.centers.dtype, batch.source[mine] * d + k, grad_mu);
    }
    for (int i = 0; targets.x.data && i < n; ++i) {
      if (batch.slot_of[i] != mine) continue;
      __syncthreads();  // the row before has been read
      for (int slot = threadIdx.x; slot < batch.slots; slot += block_threads)
        row_factors[slot] = slot == mine ? factors[i]
                            : batch.classes[slot] == batch.classes[mine]
                                ? A(0)
                                : slopes.other(g[i], distances[i * slots + slot], different[i]);
      __syncthreads();
      if (!inside) continue;
      const A u = unit_value(args, memory.r, i, k);
      A total = given ? A(0) : grad_mu / A(sizes[mine]);
      for (int slot = 0; slot < batch.slots; ++slot) total += 2 * row_factors[slot] * (u - mu_column[slot * columns]);
      memory.rows[i * d + k] = total;
    }
  }
  __syncthreads();
  if (!targets.x.data) return;
  for (int i = threadIdx.x / warp_lanes; i < n; i += block_threads / warp_lanes) {
    if (batch.slot_of[i] != mine) continue;
    const A r = args.normalize ? memory.r[i] : A(1);
    A along = 0;
    if (args.normalize && !(r == A(1) / A(args.eps)))  // else shorter than eps, where the norm is a constant
      for (std::int64_t k = lane; k < d; k += warp_lanes)
        along += memory.rows[i * d + k] * unit_value(args, memory.r, i, k);
    along = warp_sum(along);
    for (std::int64_t k = lane; k < d; k += warp_lanes) {
      A value = memory.rows[i * d + k];
      if (args.normalize) value = r * (value - along * unit_value(args, memory.r, i, k));
      store(targets.x.data, targets.x.dtype, i * d + k, value);
    }
  }
}

constexpr std::int64_t static_shared = 16384;

// Columns of a chunk: as many as fit beside the rest, at most a block's threads.
template <class A>
int columns_for(std::int64_t n, std::int64_t slots) {
  const std::int64_t rest = (2 * n + slots) * sizeof(A), room = 101376 - static_shared - rest;
  const std::int64_t columns = room / std::int64_t((slots + rows_per_block) * sizeof(A)) - 1;
  return int(columns >= block_threads ? block_threads : columns / 8 * 8);
}

template <class A>
Failure launch_distances(const MagnetArgs& args, const MagnetOut* out, const Memory<A>& memory, Stream stream) {
  const std::int64_t n = args.x.rows, slots = slots_at_most(args);
  const int columns = columns_for<A>(n, slots);
  const std::size_t bytes = ((slots + rows_per_block) * (columns + 1) + n) * sizeof(A);
  const auto kernel = out ? distances_kernel<A, true> : distances_kernel<A, false>;
  if (const Failure failure = allow_shared(kernel, bytes)) return failure;
  DML_LAUNCH(kernel, unsigned((n + rows_per_block - 1) / rows_per_block), block_threads, bytes,
             static_cast<cudaStream_t>(stream), args, out ? *out : MagnetOut{}, memory, columns, slots,
             out ? take_ticket(stream) : 0);
  return launch_failure();
}

std::size_t scratch_bytes(const MagnetArgs& args, bool gradients) {
  const std::int64_t n = args.x.rows;
  return (n + n * slots_at_most(args) + (gradients ? n * args.x.cols : 0)) * (args.wide ? 8 : 4);
}

}  // namespace

std::size_t magnet_forward_bytes(const MagnetArgs& args) { return scratch_bytes(args, false); }
std::size_t magnet_backward_bytes(const MagnetArgs& args) { return scratch_bytes(args, true); }

Failure magnet_refusal(std::int64_t n, std::int64_t clusters, std::int64_t, bool given_centers, bool wide) {
  const std::int64_t slots = given_centers || clusters < n ? clusters : n;
  if (n == 0) return "the batch has no rows";
  if (n > most_rows) return "the batch has more than 512 rows";
  if (slots > most_slots) return "more than 512 clusters may take part";
  if ((wide ? columns_for<double>(n, slots) : columns_for<float>(n, slots)) < 16)
    return "too many clusters for a block";
  return nullptr;
}

Failure magnet_forward(const MagnetArgs& args, const MagnetOut& out, void* scratch, Stream stream) {
  return with_accumulation(args.wide, [&](auto zero) {
    using A = decltype(zero);
    return launch_distances<A>(args, &out, Memory<A>(scratch, args.x.rows, slots_at_most(args)), stream);
  });
}

Failure magnet_backward(const MagnetArgs& args, const Vector& grad, const void* different, const MagnetTargets& targets,
                        void* scratch, Stream stream) {
  return with_accumulation(args.wide, [&](auto zero) -> Failure {
    using A = decltype(zero);
    const std::int64_t n = args.x.rows, slots = slots_at_most(args);
    const Memory<A> memory(scratch, n, slots);
    if (const Failure failure = launch_distances<A>(args, nullptr, memory, stream)) return failure;
    const int columns = columns_for<A>(n, slots);
    const std::size_t bytes = (slots * columns + 2 * n + slots) * sizeof(A);
    const auto kernel = gradients_kernel<A>;
    if (const Failure failure = allow_shared(kernel, bytes)) return failure;
    DML_LAUNCH(kernel, unsigned(slots + 1), block_threads, bytes, static_cast<cudaStream_t>(stream), args, grad,
               static_cast<const A*>(different), targets, memory, columns, slots);
    return launch_failure();
  });
}

}  // namespace dml::cuda
