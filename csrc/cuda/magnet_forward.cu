// The Magnet loss of a batch in one launch. A block writes the squared distances of its rows; the last block computes
// the variance, the log-sum-exps, the hinges and their sum from them.
#include "last_block.cuh"
#include "magnet.cuh"

namespace dml::cuda {
namespace {

using namespace magnet;

// In the last block. A thread takes a row.
template <class A>
__device__ void finish(const MagnetArgs& args, const MagnetOut& out, const Batch& batch, const A* distances,
                       std::int64_t slots, double* parts) {
  const BatchVariance<A> variance(args, batch, distances, slots, parts);
  double total = 0;
  for (int i = threadIdx.x; i < args.x.rows; i += block_threads) {
    OnlineLse<A, A> different;
    A kept = 0;
    if (const int row_slot = batch.slot_of[i]; row_slot >= 0) {
      for (int slot = 0; slot < batch.slots; ++slot)
        if (batch.classes[slot] != batch.classes[row_slot]) {
          const A z = -variance.scale * distances[i * slots + slot];
          if (!(z == A(-INFINITY))) different.add(z, 1);
        }
      const A hinge = A(args.alpha) + variance.scale * distances[i * slots + row_slot] + different.value();
      kept = hinge <= A(0) ? A(0) : hinge;  // NaN stays
    }
    static_cast<A*>(out.different)[i] = different.value();
    if (args.reduction == Reduction::none) static_cast<A*>(out.value)[i] = kept;
    total += kept;
  }
  total = block_sum(total, parts);
  if (threadIdx.x != 0) return;
  *static_cast<A*>(out.variance) = A(variance.measured);
  if (args.reduction != Reduction::none) *static_cast<A*>(out.value) = A(total * weight_of(args, batch));
}

template <class A>
__global__ void __launch_bounds__(block_threads, 4)
    forward_kernel(const __grid_constant__ MagnetArgs args, const __grid_constant__ MagnetOut out, A* distances,
                   const int columns, const std::int64_t slots, const unsigned ticket) {
  DML_DYNAMIC_SHARED(dynamic);
  DML_SHARED(int, sizes, most_slots);
  DML_SHARED(bool, last, 1);
  DML_BATCH(batch);
  const Workspace<A> work(dynamic, args.x.rows, columns);
  if (args.normalize) norms(args, work.r);
  count_rows(batch, int(args.x.rows), sizes);
  distances_of(args, batch, work, sizes, blockIdx.x, distances, slots);
  if (arrive_last(ticket, gridDim.x, last)) finish(args, out, batch, distances, slots, parts);
}

}  // namespace

std::size_t magnet_forward_bytes(const MagnetArgs& args) {
  return args.x.rows * slots_at_most(args) * (wide(args) ? 8 : 4);
}

Failure magnet_refusal(std::int64_t n, std::int64_t clusters, bool given_centers, bool wide) {
  const std::int64_t slots = given_centers || clusters < n ? clusters : n;
  if (n == 0) return "the batch has no rows";
  if (n > most_rows) return "the batch has more than 512 rows";
  if (slots > most_slots) return "more than 512 clusters may take part";
  if ((wide ? columns_for<double>(n, slots) : columns_for<float>(n, slots)) < 16)
    return "too many clusters for a block";
  return nullptr;
}

Failure magnet_forward(const MagnetArgs& args, const MagnetOut& out, void* scratch, Stream stream) {
  return with_accumulation(wide(args), [&](auto zero) -> Failure {
    using A = decltype(zero);
    const std::int64_t n = args.x.rows, slots = slots_at_most(args);
    const int columns = columns_for<A>(n, slots);
    const std::size_t bytes = distances_bytes<A>(n, slots, columns);
    const auto kernel = forward_kernel<A>;
    if (const Failure failure = allow_shared(kernel, bytes)) return failure;
    DML_LAUNCH(kernel, groups_of(n), block_threads, bytes, static_cast<cudaStream_t>(stream), args, out,
               static_cast<A*>(scratch), columns, slots, take_ticket(stream));
    return launch_failure();
  });
}

}  // namespace dml::cuda
