// Runs CUDA C++ on the CPU, with one fiber for each thread of a block. Blocks run one after the other or, where the
// launch is cooperative, in turn. It needs only g++ or clang, and consists of headers.
//
// It covers __syncthreads, *_sync shuffles, integer atomics, polling of them, __threadfence, static and dynamic shared
// memory, but not inline PTX, textures and timing. Every build finds barriers that only a part of the threads reaches,
// barriers at different places, lanes missing from a mask, too much shared memory, and blocks that wait for blocks that
// may not be running. A build with -fsanitize=address also finds overruns, those of shared arrays included. A build
// with -fsanitize=thread also finds missing barriers and fences, and races between blocks: TSan sees each fiber as a
// thread, ordered only by barriers and fenced atomics. The order of lanes and blocks is drawn for each launch
// (EMULATOR_SEED), and shared memory starts as garbage.
#pragma once
#include <cmath>
#include <type_traits>

#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

namespace emulator {

EMULATOR_PLAIN inline void* shared(const void* tag, std::size_t bytes) {
  Machine& m = machine();
  EMULATOR_TSAN_TO(m.main_tsan);  // allocated by the emulator, then made known to this fiber only
  unsigned char*& array = m.current->block->arrays[tag];
  if (!array) array = allocate(*m.current->block, bytes);
  void* found = array;
  EMULATOR_RELEASE(&m.allocation_sync);
  EMULATOR_TSAN_TO(m.current->tsan);
  EMULATOR_ACQUIRE(&m.allocation_sync);
  return found;
}

EMULATOR_PLAIN inline void* dynamic_shared() { return machine().current->block->dynamic; }

template <class T>
EMULATOR_PLAIN T exchange(std::uint32_t mask, T value, int from) {
  static_assert(sizeof(T) <= 16);
  Fiber* f = machine().current;
  Warp& warp = f->block->warps[f->warp];
  const unsigned phase = warp.phase;
  std::memcpy(warp.slot[phase][f->lane], &value, sizeof(T));
  wait_warp(mask, false);
  if (from >= 0 && from < 32 && (mask >> from & 1)) std::memcpy(&value, warp.slot[phase][from], sizeof(T));
  return value;
}

// Called after an atomic, which publishes what its thread wrote before a fence; the next fence acquires what others
// published.
EMULATOR_PLAIN inline void ordered(void* p) {
  Fiber* f = machine().current;
  if (f->fenced) EMULATOR_RELEASE(p);
  f->pending = p;
  ++machine().atomics;
}

EMULATOR_PLAIN inline void fence() {
  Fiber* f = machine().current;
  if (f->pending) EMULATOR_ACQUIRE(f->pending);
  f->fenced = true;
}

// A volatile load of what another block writes atomically. The other blocks run first, or the value would never change.
EMULATOR_PLAIN inline unsigned poll(unsigned* p) {
  wait_polling();
  machine().current->pending = p;
  return *p;
}

EMULATOR_PLAIN inline dim3 thread_id() { return machine().current->thread; }
EMULATOR_PLAIN inline dim3 block_id() { return machine().current->block->id; }
EMULATOR_PLAIN inline dim3 block_dim() { return machine().block; }
EMULATOR_PLAIN inline dim3 grid_dim() { return machine().grid; }
EMULATOR_PLAIN inline int lane() { return machine().current->lane; }

}  // namespace emulator

#define threadIdx (emulator::thread_id())
#define blockIdx (emulator::block_id())
#define blockDim (emulator::block_dim())
#define gridDim (emulator::grid_dim())

// A barrier is known by its line, not by its address, because compilers copy what follows a branch into both of its
// arms.
EMULATOR_PLAIN inline void __syncthreads(int line = __builtin_LINE()) { emulator::wait_block(line); }
EMULATOR_PLAIN inline void __syncwarp(std::uint32_t mask = ~0u) { emulator::wait_warp(mask, true); }
template <class T>
EMULATOR_PLAIN T __shfl_xor_sync(std::uint32_t mask, T value, int bits) {
  return emulator::exchange(mask, value, emulator::lane() ^ bits);
}
template <class T>
EMULATOR_PLAIN T __shfl_sync(std::uint32_t mask, T value, int from) {
  return emulator::exchange(mask, value, from & 31);
}
EMULATOR_PLAIN inline unsigned __ballot_sync(std::uint32_t mask, int predicate) {
  emulator::Fiber* f = emulator::machine().current;
  emulator::Warp& warp = f->block->warps[f->warp];
  const unsigned phase = warp.phase;
  std::memcpy(warp.slot[phase][f->lane], &predicate, sizeof predicate);
  emulator::wait_warp(mask, false);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    int vote = 0;
    if (mask >> lane & 1) std::memcpy(&vote, warp.slot[phase][lane], sizeof vote);
    votes |= unsigned(vote != 0) << lane;
  }
  return votes;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline void __threadfence() { emulator::fence(); }
EMULATOR_PLAIN inline unsigned atomicInc(unsigned* p, unsigned last) {
  const unsigned old = *p;
  *p = old >= last ? 0 : old + 1;
  emulator::ordered(p);
  return old;
}

#define DML_SHARED(T, name, count) \
  static char name##_tag;          \
  T* name = static_cast<T*>(emulator::shared(&name##_tag, (count) * sizeof(T)))
#define DML_DYNAMIC_SHARED(name) unsigned char* name = static_cast<unsigned char*>(emulator::dynamic_shared())
#define DML_LAUNCH(kernel, grid, block, shared, stream, ...) \
  emulator::launch(grid, block, shared, false, [=] { kernel(__VA_ARGS__); })
#define DML_LAUNCH_COOPERATIVE(kernel, grid, block, shared, stream, ...) \
  emulator::launch(grid, block, shared, true, [=] { kernel(__VA_ARGS__); })
