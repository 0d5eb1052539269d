// CUDA C++ on the CPU: one fiber for each thread of a block, blocks one after the other. Plain g++ or clang, header only.
//
// Covered: __syncthreads, *_sync shuffles, integer atomics, __threadfence, static and dynamic shared memory. Found in
// every build: barriers that a part of the threads reaches, barriers at different places, lanes missing from a mask,
// too much shared memory. With -fsanitize=address: overruns, of each shared array too. With -fsanitize=thread: missing
// barriers and fences, races between blocks (fibers are told to TSan as threads that nothing orders but barriers and
// fenced atomics). Lanes and blocks run in an order drawn anew each time (EMULATOR_SEED), shared memory starts as
// garbage. Not covered: inline PTX, textures, cooperative groups, timing.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define EMULATOR_TSAN 1
#else
#define EMULATOR_TSAN 0
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATOR_ASAN 1
#else
#define EMULATOR_ASAN 0
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
// Uninstrumented: the emulator's own state must not show up as a race.
#define EMULATOR_PLAIN __attribute__((no_sanitize("thread", "address"), noinline))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

#if !defined(__x86_64__)
#error "the emulator switches stacks with x86-64 instructions"
#endif
// Saves the callee-saved registers and the stack pointer at *from, continues at `to`.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.pushsection .text
.weak emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
.popsection
)");

namespace emulator {

struct Error : std::runtime_error {
  using runtime_error::runtime_error;
};

constexpr std::size_t stack_size = 64 << 10;
constexpr std::size_t most_shared = 232448;
enum class State { running, at_warp, at_block, done };

struct Fiber {
  void* sp;
  char* stack;
  dim3 thread;
  unsigned index, lane, warp;
  State state;
  std::uint32_t mask;
  int line;                     // of the barrier it waits at
  void *tsan, *fake, *pending;  // pending: an atomic whose order a later fence brings
  bool fenced;
};

struct Warp {
  unsigned char slot[2][32][16];
  unsigned phase = 0;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Fiber* current = nullptr;
  void *main_sp = nullptr, *main_tsan = nullptr, *main_fake = nullptr;
  const void* main_bottom = nullptr;
  std::size_t main_size = 0, shared_bytes = 0;
  dim3 grid, block, block_id;
  std::function<void()> body;
  std::vector<std::unique_ptr<unsigned char[]>> shared;  // each array an allocation of its exact size
  std::map<const void*, unsigned char*> arrays;
  unsigned char* dynamic = nullptr;
  std::deque<std::vector<char>> syncs;  // identities of barriers, for TSan
  char* sync = nullptr;
  unsigned block_phase = 0;
  char launch_sync = 0, allocation_sync = 0;
  std::string error;
  std::mt19937 order{[] {
    const char* seed = std::getenv("EMULATOR_SEED");
    return seed ? unsigned(std::atoi(seed)) : 0u;
  }()};
  long launches = 0;
};

inline Machine& machine() {
  static Machine m;
  return m;
}

#if EMULATOR_TSAN
#define EMULATOR_RELEASE(p) __tsan_release(p)
#define EMULATOR_ACQUIRE(p) __tsan_acquire(p)
#define EMULATOR_TSAN_TO(fiber) __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync)
#else
#define EMULATOR_RELEASE(p) (void)(p)
#define EMULATOR_ACQUIRE(p) (void)(p)
#define EMULATOR_TSAN_TO(fiber) (void)(fiber)
#endif

EMULATOR_PLAIN inline void to_main() {
  Machine& m = machine();
  Fiber* f = m.current;
  EMULATOR_TSAN_TO(m.main_tsan);
#if EMULATOR_ASAN
  __sanitizer_start_switch_fiber(f->state == State::done ? nullptr : &f->fake, m.main_bottom, m.main_size);
#endif
  emulator_switch(&f->sp, m.main_sp);
#if EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(f->fake, nullptr, nullptr);
#endif
}

EMULATOR_PLAIN inline void to_fiber(Fiber* f) {
  Machine& m = machine();
  m.current = f;
  EMULATOR_TSAN_TO(f->tsan);
#if EMULATOR_ASAN
  __sanitizer_start_switch_fiber(&m.main_fake, f->stack, stack_size);
#endif
  emulator_switch(&m.main_sp, f->sp);
#if EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(m.main_fake, nullptr, nullptr);
#endif
}

EMULATOR_PLAIN inline void entry() {
#if EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &machine().main_bottom, &machine().main_size);
#endif
  try {
    machine().body();
  } catch (const std::exception& e) {
    machine().error = e.what();
  }
  EMULATOR_RELEASE(&machine().launch_sync);
  machine().current->state = State::done;
  to_main();
  std::abort();
}

EMULATOR_PLAIN inline void wait_block(int line) {
  Fiber* f = machine().current;
  f->line = line, f->state = State::at_block;
  // Of two identities in turn: with one, who leaves this barrier late would take over what others did up to the next.
  char* sync = machine().sync + machine().block_phase;
  EMULATOR_RELEASE(sync);
  to_main();
  EMULATOR_ACQUIRE(sync);
}

// A shuffle orders no memory, as on the GPU; __syncwarp does.
EMULATOR_PLAIN inline void wait_warp(std::uint32_t mask, bool orders) {
  Fiber* f = machine().current;
  f->mask = mask, f->state = State::at_warp;
  char* sync = machine().sync + 2 + 2 * f->warp + machine().warps[f->warp].phase;
  if (orders) EMULATOR_RELEASE(sync);
  to_main();
  if (orders) EMULATOR_ACQUIRE(sync);
}

// Frees the warps whose lanes named in a mask all wait with that mask.
inline bool release_warps(Machine& m) {
  bool progress = false;
  for (unsigned w = 0; w < m.warps.size(); ++w) {
    const unsigned begin = w * 32, end = std::min<unsigned>(m.fibers.size(), begin + 32);
    for (unsigned i = begin; i < end; ++i) {
      if (m.fibers[i].state != State::at_warp) continue;
      const std::uint32_t mask = m.fibers[i].mask;
      if (!(mask >> m.fibers[i].lane & 1)) throw Error("*_sync called by a lane that is not in its mask");
      bool all = true;
      for (unsigned k = begin; k < end; ++k)
        if (mask >> (k - begin) & 1) all &= m.fibers[k].state == State::at_warp && m.fibers[k].mask == mask;
      if (!all) continue;
      for (unsigned k = begin; k < end; ++k) {
        if (!(mask >> (k - begin) & 1)) continue;
        m.fibers[k].state = State::running;
      }
      m.warps[w].phase ^= 1;
      progress = true;
      break;
    }
  }
  return progress;
}

inline void run_block() {
  Machine& m = machine();
  std::vector<unsigned> order(m.fibers.size());
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  for (;;) {
    bool progress = false;
    std::shuffle(order.begin(), order.end(), m.order);
    for (const unsigned i : order) {
      if (m.fibers[i].state != State::running) continue;
      progress = true;
      to_fiber(&m.fibers[i]);
      if (!m.error.empty()) throw Error(m.error);
    }
    unsigned done = 0, waiting = 0;
    int line = 0;
    for (const Fiber& f : m.fibers) {
      done += f.state == State::done;
      if (f.state != State::at_block) continue;
      ++waiting;
      if (line && line != f.line)
        throw Error("threads wait at different __syncthreads, lines " + std::to_string(line) + " and " +
                    std::to_string(f.line));
      line = f.line;
    }
    if (done == m.fibers.size()) return;
    if (waiting && waiting + done == m.fibers.size()) {
      if (done) throw Error("__syncthreads reached by " + std::to_string(waiting) + " threads after others exited");
      for (Fiber& f : m.fibers) f.state = State::running;
      m.block_phase ^= 1;
      continue;
    }
    if (!release_warps(m) && !progress)
      throw Error("deadlock: " + std::to_string(done) + " threads exited, " + std::to_string(waiting) +
                  " wait at __syncthreads, the others in a warp");
  }
}

EMULATOR_PLAIN inline unsigned char* allocate(std::size_t bytes) {
  Machine& m = machine();
  m.shared_bytes += bytes;
  if (m.shared_bytes > most_shared) throw Error("more than 227 KiB of shared memory");
  m.shared.emplace_back(new unsigned char[bytes]);
  std::memset(m.shared.back().get(), 0xCB, bytes);
  return m.shared.back().get();
}

inline void start(Fiber& f, unsigned index, dim3 block, char* stacks) {
  f.index = index, f.lane = index % 32, f.warp = index / 32;
  f.thread = dim3(index % block.x, index / block.x % block.y, index / block.x / block.y);
  f.state = State::running, f.fake = f.pending = nullptr, f.fenced = false;
  f.stack = stacks + index * stack_size;
  void** top = reinterpret_cast<void**>(f.stack + stack_size) - 2;
  *--top = nullptr;  // where entry would return to: it never does, and the stack is aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.sp = top;
#if EMULATOR_TSAN
  f.tsan = __tsan_create_fiber(0);
#endif
}

template <class Body>
void launch(dim3 grid, dim3 block, std::size_t dynamic, Body&& body) {
  Machine& m = machine();
  const unsigned threads = block.x * block.y * block.z;
  if (threads > 1024 || grid.y > 65535 || grid.z > 65535 || dynamic > most_shared) throw Error("launch configuration");
  ++m.launches;
  m.grid = grid, m.block = block, m.body = body;
  m.error.clear();
  m.fibers.resize(threads);
  m.warps.assign((threads + 31) / 32, {});
  std::vector<unsigned> blocks(grid.x * grid.y * grid.z);
  for (unsigned i = 0; i < blocks.size(); ++i) blocks[i] = i;
  std::shuffle(blocks.begin(), blocks.end(), m.order);
  const std::size_t bytes = threads * stack_size;
  char* stacks = nullptr;
  std::vector<std::pair<char*, void*>> kept;  // TSan: stacks and fibers live on, or races between blocks would hide
  const auto map = [&] {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw Error("no memory for stacks");
    return static_cast<char*>(memory);
  };
#if EMULATOR_TSAN
  m.main_tsan = __tsan_get_current_fiber();
#endif
  for (const unsigned b : blocks) {
    if (!stacks || EMULATOR_TSAN) stacks = map();
#if EMULATOR_ASAN
    __asan_unpoison_memory_region(stacks, bytes);
#endif
    m.block_id = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
    m.syncs.emplace_back(2 + 2 * m.warps.size());
    m.sync = m.syncs.back().data();
    if (!EMULATOR_TSAN) m.shared.clear();
    m.arrays.clear(), m.shared_bytes = 0;
    m.dynamic = allocate(dynamic);
    for (unsigned i = 0; i < threads; ++i) {
      start(m.fibers[i], i, block, stacks);
      if (EMULATOR_TSAN) kept.push_back({i ? nullptr : stacks, m.fibers[i].tsan});
    }
    run_block();
  }
#if EMULATOR_TSAN
  EMULATOR_ACQUIRE(&m.launch_sync);
  for (const auto& [memory, fiber] : kept) __tsan_destroy_fiber(fiber);
#endif
  if (!EMULATOR_TSAN) munmap(stacks, bytes);
  m.shared.clear(), m.syncs.clear();
}

EMULATOR_PLAIN inline void* shared(const void* tag, std::size_t bytes) {
  Machine& m = machine();
  EMULATOR_TSAN_TO(m.main_tsan);  // allocated by the emulator, then made known to this fiber only
  unsigned char*& array = m.arrays[tag];
  if (!array) array = allocate(bytes);
  void* found = array;
  EMULATOR_RELEASE(&m.allocation_sync);
  EMULATOR_TSAN_TO(m.current->tsan);
  EMULATOR_ACQUIRE(&m.allocation_sync);
  return found;
}

EMULATOR_PLAIN inline void* dynamic_shared() { return machine().dynamic; }

template <class T>
EMULATOR_PLAIN T exchange(std::uint32_t mask, T value, int from) {
  static_assert(sizeof(T) <= 16);
  Fiber* f = machine().current;
  Warp& warp = machine().warps[f->warp];
  const unsigned phase = warp.phase;
  std::memcpy(warp.slot[phase][f->lane], &value, sizeof(T));
  wait_warp(mask, false);
  if (from >= 0 && from < 32 && (mask >> from & 1)) std::memcpy(&value, warp.slot[phase][from], sizeof(T));
  return value;
}

// Around an atomic: it publishes what its thread wrote before a fence, and takes over at the next fence.
EMULATOR_PLAIN inline void ordered(void* p) {
  Fiber* f = machine().current;
  if (f->fenced) EMULATOR_RELEASE(p);
  f->pending = p;
}

EMULATOR_PLAIN inline void fence() {
  Fiber* f = machine().current;
  if (f->pending) EMULATOR_ACQUIRE(f->pending);
  f->fenced = true;
}

EMULATOR_PLAIN inline dim3 thread_id() { return machine().current->thread; }
EMULATOR_PLAIN inline dim3 block_id() { return machine().block_id; }
EMULATOR_PLAIN inline dim3 block_dim() { return machine().block; }
EMULATOR_PLAIN inline dim3 grid_dim() { return machine().grid; }
EMULATOR_PLAIN inline int lane() { return machine().current->lane; }

}  // namespace emulator

#define threadIdx (emulator::thread_id())
#define blockIdx (emulator::block_id())
#define blockDim (emulator::block_dim())
#define gridDim (emulator::grid_dim())

// The line, not the address: compilers copy what follows a branch into both of its arms.
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
  emulator::Warp& warp = emulator::machine().warps[f->warp];
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
  emulator::launch(grid, block, shared, [=] { kernel(__VA_ARGS__); })
