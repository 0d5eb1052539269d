// The emulator's threads: a fiber for each thread of a block, its stack, and what the sanitizers must be told at a
// switch.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define EMULATOR_TSAN 1
#define EMULATOR_RELEASE(p) __tsan_release(p)
#define EMULATOR_ACQUIRE(p) __tsan_acquire(p)
#define EMULATOR_TSAN_TO(fiber) __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync)
#else
#define EMULATOR_TSAN 0
#define EMULATOR_RELEASE(p) (void)(p)
#define EMULATOR_ACQUIRE(p) (void)(p)
#define EMULATOR_TSAN_TO(fiber) (void)(fiber)
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATOR_ASAN 1
#else
#define EMULATOR_ASAN 0
#endif

// Not instrumented, because the emulator's own state must not show up as a race.
#define EMULATOR_PLAIN __attribute__((no_sanitize("thread", "address"), noinline))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

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
// `polling`: the thread waits for what another block writes.
enum class State { running, at_warp, at_block, polling, done };

struct Block;

struct Fiber {
  void* sp;
  char* stack;
  Block* block;
  dim3 thread;
  unsigned index, lane, warp;
  State state;
  std::uint32_t mask;
  int line;                     // of the barrier it waits at
  void *tsan, *fake, *pending;  // pending: an atomic that the next fence orders
  bool fenced;
};

struct Warp {
  unsigned char slot[2][32][16];
  unsigned phase = 0;
};

struct Block {
  dim3 id;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<unsigned char[]>> shared;  // each array an allocation of its exact size
  std::map<const void*, unsigned char*> arrays;
  std::size_t shared_bytes = 0;
  unsigned char* dynamic = nullptr;
  std::vector<char> syncs;  // identities of barriers, for TSan
  unsigned phase = 0;
  char* stacks = nullptr;
};

struct Machine {
  Fiber* current = nullptr;
  void *main_sp = nullptr, *main_tsan = nullptr, *main_fake = nullptr;
  const void* main_bottom = nullptr;
  std::size_t main_size = 0, stack_bytes = 0;
  dim3 grid, block;
  std::function<void()> body;
  std::vector<char*> free_stacks;  // of stack_bytes each
  char launch_sync = 0, allocation_sync = 0;
  std::string error;
  std::mt19937 order{[] {
    const char* seed = std::getenv("EMULATOR_SEED");
    return seed ? unsigned(std::atoi(seed)) : 0u;
  }()};
  long launches = 0, atomics = 0;
};

inline Machine& machine() {
  static Machine m;
  return m;
}

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

inline void start(Fiber& f, unsigned index, dim3 block, Block& of) {
  f.index = index, f.lane = index % 32, f.warp = index / 32, f.block = &of;
  f.thread = dim3(index % block.x, index / block.x % block.y, index / block.x / block.y);
  f.state = State::running, f.fake = f.pending = nullptr, f.fenced = false;
  f.stack = of.stacks + index * stack_size;
  void** top = reinterpret_cast<void**>(f.stack + stack_size) - 2;
  *--top = nullptr;  // the return address of entry, which never returns; the stack is aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.sp = top;
#if EMULATOR_TSAN
  f.tsan = __tsan_create_fiber(0);
#endif
}

inline char* take_stacks(std::size_t bytes) {
  Machine& m = machine();
  if (m.stack_bytes != bytes) {
    for (char* memory : m.free_stacks) munmap(memory, m.stack_bytes);
    m.free_stacks.clear(), m.stack_bytes = bytes;
  }
  char* stacks = nullptr;
  if (m.free_stacks.empty()) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw Error("no memory for stacks");
    stacks = static_cast<char*>(memory);
  } else {
    stacks = m.free_stacks.back(), m.free_stacks.pop_back();
  }
#if EMULATOR_ASAN
  __asan_unpoison_memory_region(stacks, bytes);
#endif
  return stacks;
}

}  // namespace emulator
