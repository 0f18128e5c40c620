// The threads of a block as fibers, which run until they wait for each other. Kernels whose threads
// exchange values are so tested without a GPU.
#pragma once

#include <ucontext.h>

#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

namespace emulation {

constexpr unsigned kWarpSize = 32;

// A point that `size` threads must reach before any of them goes on.
struct Barrier {
  unsigned size = 0;
  unsigned arrived = 0;
  uint64_t generation = 0;
};

class Block {
 public:
  // Runs thread() for as many threads; enter(i) is called whenever thread i goes on.
  void run(unsigned threads, const std::function<void()>& thread,
           const std::function<void(unsigned)>& enter) {
    while (fibers_.size() < threads) fibers_.push_back(std::make_unique<Fiber>());
    thread_ = &thread;
    warps_.assign((threads + kWarpSize - 1) / kWarpSize, Warp());
    for (unsigned i = 0; i < warps_.size(); ++i)
      warps_[i].barrier.size = std::min(kWarpSize, threads - i * kWarpSize);
    all_ = {threads, 0, 0};
    for (unsigned i = 0; i < threads; ++i) fibers_[i]->state = State::kNew;
    for (unsigned left = threads; left > 0;) {
      bool progress = false;
      for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = *fibers_[i];
        if (fiber.state == State::kDone) continue;
        if (fiber.state == State::kWaiting && fiber.barrier->generation == fiber.generation)
          continue;
        progress = true;
        current_ = i;
        enter(i);
        resume(fiber);
        if (fiber.state == State::kDone) --left;
      }
      if (!progress) {
        std::fputs("The threads of a block wait for one that has ended.\n", stderr);
        std::abort();
      }
    }
  }

  void wait_for_block() { wait(all_); }
  void wait_for_warp() { wait(warp().barrier); }

  // The value of another thread of the warp.
  template <typename V>
  V exchange(V value, unsigned lane) {
    V other;
    std::memcpy(&other, share(value)[lane], sizeof(V));
    return other;
  }

  // One bit for each thread of the warp.
  uint32_t ballot(bool vote) {
    const Slot* slots = share(vote);
    uint32_t votes = 0;
    for (unsigned i = 0; i < kWarpSize; ++i) votes |= uint32_t{slots[i][0]} << i;
    return votes;
  }

  unsigned lane() const { return current_ % kWarpSize; }

 private:
  enum class State { kNew, kRunning, kWaiting, kDone };

  struct Fiber {
    State state = State::kNew;
    Barrier* barrier = nullptr;
    uint64_t generation = 0;
    uint64_t exchanges = 0;
    std::jmp_buf inside;
    ucontext_t context;
    std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStackBytes);
  };
  using Slot = unsigned char[8];
  struct Warp {
    Barrier barrier;
    Slot slots[2][kWarpSize];
  };
  static constexpr size_t kStackBytes = size_t{1} << 18;

  Warp& warp() { return warps_[current_ / kWarpSize]; }

  // The values of all threads of the warp.
  template <typename V>
  const Slot* share(V value) {
    // Two buffers: whoever writes one again has met all who read it.
    Fiber& self = *fibers_[current_];
    Warp& of_self = warp();
    Slot* slots = of_self.slots[self.exchanges++ % 2];
    std::memcpy(slots[current_ % kWarpSize], &value, sizeof(V));
    wait(of_self.barrier);
    return slots;
  }

  // setjmp and longjmp switch without the system call that swapcontext makes.
  void resume(Fiber& fiber) {
    const bool is_new = fiber.state == State::kNew;
    fiber.state = State::kRunning;
    if (_setjmp(outside_) != 0) return;
    if (!is_new) _longjmp(fiber.inside, 1);
    fiber.exchanges = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    started_ = this;
    makecontext(&fiber.context, &start, 0);
    setcontext(&fiber.context);
  }

  static void start() {
    Block& self = *started_;
    (*self.thread_)();
    self.fibers_[self.current_]->state = State::kDone;
    _longjmp(self.outside_, 1);
  }

  void wait(Barrier& barrier) {
    if (++barrier.arrived == barrier.size) {
      barrier.arrived = 0;
      ++barrier.generation;
      return;
    }
    Fiber& fiber = *fibers_[current_];
    fiber.state = State::kWaiting;
    fiber.barrier = &barrier;
    fiber.generation = barrier.generation;
    if (_setjmp(fiber.inside) == 0) _longjmp(outside_, 1);
  }

  inline static Block* started_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Warp> warps_;
  Barrier all_;
  unsigned current_ = 0;
  const std::function<void()>* thread_ = nullptr;
  std::jmp_buf outside_;
};

inline Block block;

}  // namespace emulation
