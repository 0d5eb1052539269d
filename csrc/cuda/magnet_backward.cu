// The gradients of the Magnet loss in one cooperative launch. The blocks compute the squared distances again and wait
// for each other, because every gradient needs that of the variance, and so all distances. Then each block takes one
// cluster at a time.
#include <algorithm>

#include "grid_barrier.cuh"
#include "magnet.cuh"

namespace dml::cuda {
namespace {

using namespace magnet;

// The gradient of the distance between a row and the centre of a slot; g is the gradient of the row's hinge.
template <class A>
struct Slopes {
  A scale, per_distance;  // per_distance: of each row to its centre, through the variance

  __device__ A same_cluster(A g) const { return g * scale + per_distance; }
  __device__ A other_class(A g, A distance, A lse) const {
    return lse == A(-INFINITY) ? A(0) : -scale * g * exp(-scale * distance - lse);
  }
};

// What a block works on once the distances are complete.
template <class A>
struct Context {
  const MagnetArgs& args;
  const MagnetTargets& targets;
  const Batch& batch;
  const Workspace<A>& work;
  const int* sizes;
  const A *distances, *different;  // (N, slots), (N,)
  std::int64_t slots;
  A* grad_rows;  // scratch (N, D)
  // In shared memory behind the centres: the gradients of the hinges (N,), the factors of all rows for one centre (N,),
  // and those of all centres for one row (slots,).
  A *g, *factors, *row_factors;

  __device__ A distance(int i, int slot) const { return distances[i * slots + slot]; }
};

// Computes the gradients of the hinges and, from all pairs, that of the variance; the same in every block.
template <class A>
__device__ Slopes<A> hinges(const Context<A>& p, const Vector& grad, double* parts) {
  const MagnetArgs& args = p.args;
  const Batch& batch = p.batch;
  const int n = int(args.x.rows);
  const BatchVariance<A> variance(args, batch, p.distances, p.slots, parts);
  double grad_scale = 0;
  for (int i = threadIdx.x; i < n; i += block_threads) {
    const int row_slot = batch.slot_of[i];
    const bool active =
        row_slot >= 0 && !(A(args.alpha) + variance.scale * p.distance(i, row_slot) + p.different[i] <= A(0));
    p.g[i] = active ? load<A>(grad, i, A(0)) * A(weight_of(args, batch)) : A(0);
    if (active) grad_scale += double(p.g[i]) * p.distance(i, row_slot);
  }
  __syncthreads();
  for (int pair = threadIdx.x; pair < n * batch.slots; pair += block_threads) {
    const int i = pair / batch.slots, slot = pair % batch.slots, row_slot = batch.slot_of[i];
    if (row_slot < 0 || p.g[i] == A(0) || batch.classes[slot] == batch.classes[row_slot]) continue;
    const A distance = p.distance(i, slot), lse = p.different[i];
    if (lse != A(-INFINITY)) grad_scale -= double(p.g[i]) * exp(-variance.scale * distance - lse) * distance;
  }
  grad_scale = block_sum(grad_scale, parts);
  const double grad_variance = variance.floored ? 0 : -2 * double(variance.scale) * double(variance.scale) * grad_scale;
  if (blockIdx.x == 0 && threadIdx.x == 0 && p.targets.variance.data)
    store(p.targets.variance.data, p.targets.variance.dtype, 0, A(grad_variance));
  return {variance.scale, A(args.variance.data ? 0 : grad_variance / BatchVariance<A>::degrees(batch))};
}

// Writes the gradients, zero, of the rows and the given centres that take no part.
template <class A>
__device__ void zero_the_rest(const Context<A>& p) {
  const Target x = p.targets.x, centers = p.targets.centers;
  const std::int64_t d = p.args.x.cols;
  for (std::int64_t k = threadIdx.x; k < d; k += block_threads) {
    for (int i = 0; i < p.args.x.rows; ++i)
      if (p.batch.slot_of[i] < 0 && x.data) store(x.data, x.dtype, i * d + k, A(0));
    for (int id = 0; p.args.centers.data && centers.data && id < p.args.cluster_count; ++id)
      if (p.args.classes[id] == p.args.ignore) store(centers.data, centers.dtype, id * d + k, A(0));
  }
}

// The gradient of column k of the cluster's centre. The distance of row i adds -2 factor (u - mu) to it.
template <class A>
__device__ A center_gradient(const Context<A>& p, int current, std::int64_t k, A center) {
  A total = 0;
  for (int i = 0; i < p.args.x.rows; ++i)
    if (p.batch.slot_of[i] >= 0) total -= 2 * p.factors[i] * (unit_value(p.args, p.work.r, i, k) - center);
  if (p.args.centers.data && p.targets.centers.data)
    store(p.targets.centers.data, p.targets.centers.dtype, p.batch.source[current] * p.args.x.cols + k, total);
  return total;
}

// Computes the gradients of the unit rows of cluster `current`, and of its centre where that is given. With `staged`,
// all columns of the centres are in shared memory already.
template <class A>
__device__ void cluster_gradients(const Context<A>& p, const Slopes<A>& slopes, int current, bool staged) {
  const MagnetArgs& args = p.args;
  const Batch& batch = p.batch;
  const int n = int(args.x.rows), stride = p.work.stride();
  const bool given = args.centers.data;
  for (int i = threadIdx.x; i < n; i += block_threads) {
    const int row_slot = batch.slot_of[i];
    A factor = 0;
    if (row_slot == current)
      factor = slopes.same_cluster(p.g[i]);
    else if (row_slot >= 0 && batch.classes[row_slot] != batch.classes[current])
      factor = slopes.other_class(p.g[i], p.distance(i, current), p.different[i]);
    p.factors[i] = factor;
  }
  for (std::int64_t begin = 0; begin < args.x.cols; begin += p.work.columns) {
    const std::int64_t k = begin + threadIdx.x;  // a chunk has no more columns than the block has threads
    const bool inside = int(threadIdx.x) < p.work.columns && k < args.x.cols;
    const A* mu = p.work.centers() + threadIdx.x;
    A grad_mu = 0;
    __syncthreads();  // factors are complete; row factors of the previous chunk have been read
    if (!staged) stage_centers(args, batch, p.work, p.sizes, begin);
    if (inside) grad_mu = center_gradient(p, current, k, mu[current * stride]);
    for (int i = 0; p.targets.x.data && i < n; ++i) {
      if (batch.slot_of[i] != current) continue;
      __syncthreads();  // the factors of the previous row have been read
      for (int slot = threadIdx.x; slot < batch.slots; slot += block_threads)
        p.row_factors[slot] = slot == current ? p.factors[i]
                              : batch.classes[slot] == batch.classes[current]
                                  ? A(0)
                                  : slopes.other_class(p.g[i], p.distance(i, slot), p.different[i]);
      __syncthreads();
      if (!inside) continue;
      const A u = unit_value(args, p.work.r, i, k);
      A total = given ? A(0) : grad_mu / A(p.sizes[current]);
      for (int slot = 0; slot < batch.slots; ++slot) total += 2 * p.row_factors[slot] * (u - mu[slot * stride]);
      p.grad_rows[i * args.x.cols + k] = total;
    }
  }
}

// Turns the gradients of unit rows into those of the rows as they came, and writes them. A warp takes a row.
template <class A>
__device__ void write_rows(const Context<A>& p, int current) {
  const MagnetArgs& args = p.args;
  const Target target = p.targets.x;
  const std::int64_t d = args.x.cols;
  const int lane = threadIdx.x % warp_lanes;
  for (int i = threadIdx.x / warp_lanes; i < args.x.rows; i += block_threads / warp_lanes) {
    if (p.batch.slot_of[i] != current) continue;
    const A r = args.normalize ? p.work.r[i] : A(1);
    const A* grad = p.grad_rows + i * d;
    A along = 0;
    if (args.normalize && !(r == A(1) / A(args.eps)))  // else shorter than eps, where the norm is a constant
      for (std::int64_t k = lane; k < d; k += warp_lanes) along += grad[k] * unit_value(args, p.work.r, i, k);
    along = warp_sum(along);
    for (std::int64_t k = lane; k < d; k += warp_lanes) {
      const A value = args.normalize ? r * (grad[k] - along * unit_value(args, p.work.r, i, k)) : grad[k];
      store(target.data, target.dtype, i * d + k, value);
    }
  }
}

template <class A>
__global__ void __launch_bounds__(block_threads, 4)
    backward_kernel(const __grid_constant__ MagnetArgs args, const Vector grad, const A* different,
                    const __grid_constant__ MagnetTargets targets, A* distances, const int columns,
                    const std::int64_t slots, const unsigned ticket) {
  DML_DYNAMIC_SHARED(dynamic);
  DML_SHARED(int, sizes, most_slots);
  DML_BATCH(batch);
  const int n = int(args.x.rows), groups = (n + rows_per_block - 1) / rows_per_block;
  const Workspace<A> work(dynamic, n, columns);
  // Scratch: distances (N, slots), gradients of unit rows (N, D), r (N,) for blocks that compute no distances.
  A *grad_rows = distances + n * slots, *r = grad_rows + n * args.x.cols;
  const bool measures = int(blockIdx.x) < groups;
  if (args.normalize && measures) norms(args, work.r);
  count_rows(batch, n, sizes);
  for (int group = blockIdx.x; group < groups; group += gridDim.x)
    distances_of(args, batch, work, sizes, group, distances, slots);
  if (args.normalize && blockIdx.x == 0)
    for (int i = threadIdx.x; i < n; i += block_threads) r[i] = work.r[i];
  grid_barrier(ticket, gridDim.x);
  if (args.normalize && !measures)
    for (int i = threadIdx.x; i < n; i += block_threads) work.r[i] = r[i];  // in place after the barriers of hinges()

  A* g = work.rows(batch.slots);
  const Context<A> context{args,      targets, batch,     work, sizes, distances,
                           different, slots,   grad_rows, g,    g + n, g + 2 * n};
  const Slopes<A> slopes = hinges(context, grad, parts);
  const bool whole = args.x.cols <= columns;
  bool staged = whole && measures;  // by distances_of
  for (int current = blockIdx.x; current < batch.slots; current += gridDim.x) {
    __syncthreads();  // factors of the previous cluster have been read
    cluster_gradients(context, slopes, current, staged);
    __syncthreads();
    if (targets.x.data) write_rows(context, current);
    staged = whole;
  }
  if (blockIdx.x + 1 == gridDim.x) zero_the_rest(context);
}

}  // namespace

std::size_t magnet_backward_bytes(const MagnetArgs& args) {
  return args.x.rows * (slots_at_most(args) + args.x.cols + 1) * (wide(args) ? 8 : 4);
}

Failure magnet_backward(const MagnetArgs& args, const Vector& grad, const void* different, const MagnetTargets& targets,
                        void* scratch, Stream stream) {
  return with_accumulation(wide(args), [&](auto zero) -> Failure {
    using A = decltype(zero);
    const std::int64_t n = args.x.rows, slots = slots_at_most(args), groups = groups_of(n);
    const int columns = columns_for<A>(n, slots);
    const std::size_t gradients_bytes = (3 * n + slots * (columns + 2)) * sizeof(A);
    const std::size_t bytes = std::max(distances_bytes<A>(n, slots, columns), gradients_bytes);
    const auto kernel = backward_kernel<A>;
    if (const Failure failure = allow_shared(kernel, bytes)) return failure;
    const std::int64_t blocks = resident_blocks(kernel, bytes, slots > groups ? slots : groups);
    if (blocks == 0) return "the device runs no cooperative launch of this size";
    DML_LAUNCH_COOPERATIVE(kernel, unsigned(blocks), block_threads, bytes, static_cast<cudaStream_t>(stream), args,
                           grad, static_cast<const A*>(different), targets, static_cast<A*>(scratch), columns, slots,
                           take_ticket(stream));
    return launch_failure();
  });
}

}  // namespace dml::cuda
