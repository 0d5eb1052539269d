// The block of a launch that arrives last finishes what the others began, in a fixed order.
#pragma once
#include <atomic>

#include "platform.cuh"

namespace dml::cuda {

// A ticket counts the blocks of a launch that have finished, and is back at 0 when the launch ends. Launches that run
// at the same time hold different tickets: eager launches take them in turn; a captured launch keeps its ticket,
// because a graph may replay it at any time.
constexpr unsigned eager_tickets = 1u << 14, captured_tickets = 1u << 16;
static __device__ unsigned tickets[eager_tickets + captured_tickets];

// Returns true in all threads of the block that arrives last, which then sees what the others wrote. `last` is a bool
// in shared memory.
__device__ __forceinline__ bool arrive_last(unsigned ticket, unsigned blocks, bool* last) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *last = atomicInc(&tickets[ticket], blocks - 1) == blocks - 1;
    __threadfence();
  }
  __syncthreads();
  return *last;
}

#ifdef DML_CUDA_EMULATOR
inline unsigned take_ticket(Stream) { return 0; }
#else
inline unsigned take_ticket(Stream stream) {
  static std::atomic<unsigned> eager{0}, captured{0};
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  if (status == cudaStreamCaptureStatusNone) return eager++ % eager_tickets;
  return eager_tickets + captured++ % captured_tickets;
}
#endif

}  // namespace dml::cuda
