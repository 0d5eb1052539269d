// Runs the blocks of a launch, one after the other, or in turn where the launch is cooperative; and holds what lets a
// thread wait.
#pragma once
#include <algorithm>
#include <cstring>
#include <deque>

#include "fibers.h"

namespace emulator {

constexpr std::size_t most_shared = 232448;

EMULATOR_PLAIN inline void wait_block(int line) {
  Fiber* f = machine().current;
  f->line = line, f->state = State::at_block;
  // Two identities take turns. With a single one, a thread that leaves this barrier late would acquire what others did
  // up to the next.
  char* sync = f->block->syncs.data() + f->block->phase;
  EMULATOR_RELEASE(sync);
  to_main();
  EMULATOR_ACQUIRE(sync);
}

// A shuffle orders no memory, as on the GPU; __syncwarp does.
EMULATOR_PLAIN inline void wait_warp(std::uint32_t mask, bool orders) {
  Fiber* f = machine().current;
  f->mask = mask, f->state = State::at_warp;
  char* sync = f->block->syncs.data() + 2 + 2 * f->warp + f->block->warps[f->warp].phase;
  if (orders) EMULATOR_RELEASE(sync);
  to_main();
  if (orders) EMULATOR_ACQUIRE(sync);
}

// Lets other blocks run.
EMULATOR_PLAIN inline void wait_polling() {
  machine().current->state = State::polling;
  to_main();
}

// Releases the warps in which all lanes of a mask wait with that mask.
inline bool release_warps(Block& block) {
  std::vector<Fiber>& fibers = block.fibers;
  bool progress = false;
  for (unsigned w = 0; w < block.warps.size(); ++w) {
    const unsigned begin = w * 32, end = std::min<unsigned>(fibers.size(), begin + 32);
    for (unsigned i = begin; i < end; ++i) {
      if (fibers[i].state != State::at_warp) continue;
      const std::uint32_t mask = fibers[i].mask;
      if (!(mask >> fibers[i].lane & 1)) throw Error("*_sync called by a lane that is not in its mask");
      bool all = true;
      for (unsigned k = begin; k < end; ++k)
        if (mask >> (k - begin) & 1) all &= fibers[k].state == State::at_warp && fibers[k].mask == mask;
      if (!all) continue;
      for (unsigned k = begin; k < end; ++k) {
        if (!(mask >> (k - begin) & 1)) continue;
        fibers[k].state = State::running;
      }
      block.warps[w].phase ^= 1;
      progress = true;
      break;
    }
  }
  return progress;
}

// Releases a block's barrier if all threads have reached it.
inline bool release_barrier(Block& block, unsigned waiting, unsigned done) {
  int line = 0;
  for (const Fiber& f : block.fibers) {
    if (f.state != State::at_block) continue;
    if (line && line != f.line)
      throw Error("threads wait at different __syncthreads, lines " + std::to_string(line) + " and " +
                  std::to_string(f.line));
    line = f.line;
  }
  if (!waiting || waiting + done != block.fibers.size()) return false;
  if (done) throw Error("__syncthreads reached by " + std::to_string(waiting) + " threads after others exited");
  for (Fiber& f : block.fibers) f.state = State::running;
  block.phase ^= 1;
  return true;
}

// Runs a block until it is done, and returns true, or until its threads wait for another block, and returns false.
inline bool run(Block& block) {
  Machine& m = machine();
  const auto count = [&](State state) {
    return unsigned(
        std::count_if(block.fibers.begin(), block.fibers.end(), [state](const Fiber& f) { return f.state == state; }));
  };
  std::vector<unsigned> order(block.fibers.size());
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  for (Fiber& f : block.fibers)
    if (f.state == State::polling) f.state = State::running;
  for (;;) {
    bool progress = false;
    std::shuffle(order.begin(), order.end(), m.order);
    for (const unsigned i : order) {
      if (block.fibers[i].state != State::running) continue;
      progress = true;
      to_fiber(&block.fibers[i]);
      if (!m.error.empty()) throw Error(m.error);
    }
    const unsigned done = count(State::done), waiting = count(State::at_block);
    if (done == block.fibers.size()) return true;
    if (release_barrier(block, waiting, done) || release_warps(block) || progress) continue;
    if (count(State::polling)) return false;
    throw Error("deadlock: " + std::to_string(done) + " threads exited, " + std::to_string(waiting) +
                " wait at __syncthreads, the others in a warp");
  }
}

EMULATOR_PLAIN inline unsigned char* allocate(Block& block, std::size_t bytes) {
  block.shared_bytes += bytes;
  if (block.shared_bytes > most_shared) throw Error("more than 227 KiB of shared memory");
  block.shared.emplace_back(new unsigned char[bytes]);
  std::memset(block.shared.back().get(), 0xCB, bytes);
  return block.shared.back().get();
}

inline void begin(Block& block, unsigned number, std::size_t dynamic) {
  const Machine& m = machine();
  const unsigned threads = m.block.x * m.block.y * m.block.z;
  block.id = dim3(number % m.grid.x, number / m.grid.x % m.grid.y, number / m.grid.x / m.grid.y);
  block.stacks = take_stacks(threads * stack_size);
  block.warps.assign((threads + 31) / 32, {});
  block.syncs.resize(2 + 2 * block.warps.size());
  block.dynamic = allocate(block, dynamic);
  block.fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) start(block.fibers[i], i, m.block, block);
}

// Under TSan, stacks, fibers and shared memory live to the end of the launch, and stacks are never reused: reuse would
// hide races between blocks.
inline void end([[maybe_unused]] Block& block) {
#if EMULATOR_TSAN
  for (const Fiber& f : block.fibers) __tsan_destroy_fiber(f.tsan);
#else
  machine().free_stacks.push_back(block.stacks);
#endif
}

// Runs all blocks in turn until all are done.
inline void run_cooperative(std::deque<Block>& blocks) {
  Machine& m = machine();
  std::vector<Block*> left;
  for (Block& block : blocks) left.push_back(&block);
  for (int idle = 0; !left.empty();) {
    const long before = m.atomics;
    std::shuffle(left.begin(), left.end(), m.order);
    const auto done = std::remove_if(left.begin(), left.end(), [](Block* block) { return run(*block); });
    idle = done == left.end() && m.atomics == before ? idle + 1 : 0;
    if (idle > 2) throw Error("deadlock: blocks wait for each other, and none arrives");
    left.erase(done, left.end());
  }
}

template <class Body>
void launch(dim3 grid, dim3 block, std::size_t dynamic, bool cooperative, Body&& body) {
  Machine& m = machine();
  const unsigned threads = block.x * block.y * block.z;
  if (threads > 1024 || grid.y > 65535 || grid.z > 65535 || dynamic > most_shared) throw Error("launch configuration");
  ++m.launches;
  m.grid = grid, m.block = block, m.body = body;
  m.error.clear();
  std::vector<unsigned> numbers(grid.x * grid.y * grid.z);
  for (unsigned i = 0; i < numbers.size(); ++i) numbers[i] = i;
  std::shuffle(numbers.begin(), numbers.end(), m.order);
#if EMULATOR_TSAN
  m.main_tsan = __tsan_get_current_fiber();
#endif
  std::deque<Block> blocks;
  for (const unsigned number : numbers) {
    begin(blocks.emplace_back(), number, dynamic);
    if (cooperative) continue;
    if (!run(blocks.back())) throw Error("a block waits for another, and the launch is not cooperative");
    if (!EMULATOR_TSAN) end(blocks.back()), blocks.pop_back();
  }
  if (cooperative) run_cooperative(blocks);
  EMULATOR_ACQUIRE(&m.launch_sync);
  for (Block& each : blocks) end(each);
}

}  // namespace emulator
