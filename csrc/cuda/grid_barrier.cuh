// A barrier of all blocks of a launch. The launch must be cooperative, so that all of its blocks are running.
#pragma once
#include "last_block.cuh"

namespace dml::cuda {

#ifdef DML_CUDA_EMULATOR
using emulator::poll;
#else
__device__ __forceinline__ unsigned poll(const unsigned* p) { return *static_cast<const volatile unsigned*>(p); }
#endif

// Afterwards every thread sees what any thread wrote before. To be used once in a launch: a block counts itself when it
// arrives and when it leaves, and the ticket is back at 0 when all have left.
__device__ __forceinline__ void grid_barrier(unsigned ticket, unsigned blocks) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicInc(&tickets[ticket], 2 * blocks - 1);
    while (poll(&tickets[ticket]) < blocks) {
    }
    __threadfence();
    atomicInc(&tickets[ticket], 2 * blocks - 1);
  }
  __syncthreads();
}

}  // namespace dml::cuda
