// Runs CUDA kernels on the CPU, for their tests: a fiber a CUDA thread, which runs until it waits (a barrier,
// a shuffle, a product of its warp, a look at another block's data); then any other that can run does, in
// random order, as a fixed one would hide a missing barrier. Blocks that meet take turns in the same way.
// (Threads of the operating system, which they are for ThreadSanitizer alone, would look for each other's
// data all the time: on a busy machine each look that finds none costs a time slice.)
#pragma once

#include <sched.h>
#include <ucontext.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};

namespace emulated {

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
extern "C" void fastrnn_switch(void** from, void* to);
asm(R"(.text
.weak fastrnn_switch
.type fastrnn_switch,@function
fastrnn_switch:
 pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
 movq %rsp,(%rdi); movq %rsi,%rsp
 popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
 ret)");
struct Context {
  void* top = nullptr;
  void drop() {}
  void make(char* stack, size_t bytes, void (*start)()) {
    void** p = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t(15));
    *--p = nullptr;
    *--p = reinterpret_cast<void*>(start);
    for (int i = 0; i < 6; i++) *--p = nullptr;
    top = p;
  }
  void adopt() {}
  static void change(Context& from, Context& to) { fastrnn_switch(&from.top, to.top); }
};
#else
struct Context {
  ucontext_t context;
#if defined(__SANITIZE_THREAD__)
  void* fiber = nullptr;
  void adopt() { fiber = __tsan_get_current_fiber(); }
  void drop() { __tsan_destroy_fiber(fiber); }
#else
  void adopt() {}
  void drop() {}
#endif
  void make(char* stack, size_t bytes, void (*start)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack, context.uc_stack.ss_size = bytes, context.uc_link = nullptr;
    makecontext(&context, start, 0);
#if defined(__SANITIZE_THREAD__)
    if (!fiber) fiber = __tsan_create_fiber(0);
#endif
  }
  static void change(Context& from, Context& to) {
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(to.fiber, 0);
#endif
    swapcontext(&from.context, &to.context);
  }
};
#endif

struct Barrier {
  int needed = 0;
  std::vector<int> waiting;
};
struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack;
};
struct Lane {
  uint32_t word[6];
};

constexpr size_t kStack = 64 << 10;
inline std::atomic<bool> failed;       // a thread gave up: all stop
inline std::atomic<unsigned> seed{1};  // of the order of fibers
inline std::atomic<int> delayed{-1};   // the block that waits long at each look
#if defined(__SANITIZE_THREAD__)
constexpr bool kThreads = true;  // each block of its own, which are seen to race
#else
constexpr bool kThreads = false;
#endif

struct Block;
// The blocks of a launch, which find one another, and how many of a cluster have come to its meetings.
struct Together {
  std::vector<Block*> blocks;
  std::vector<std::atomic<int>> met;
};

struct Block {
  dim3 index, grid;
  int number = 0, meetings = 0;
  Together* together = nullptr;
  int current = -1;
  std::vector<Fiber> fibers;
  std::vector<int> ready;
  std::vector<Barrier> barriers;  // of the warps, then of all
  Barrier numbered[16];           // of some
  std::vector<Lane> lanes;
  std::unique_ptr<uint4[]> shared;
  Context caller;
  std::function<void()> body;
  std::minstd_rand random;
  int left = 0;

  ~Block() {
    for (Fiber& fiber : fibers) fiber.context.drop();
  }
};
inline thread_local Block* block = nullptr;

inline void next(bool other_block = false) {
  Block& b = *block;
  const int from = b.current;
  if (failed.load(std::memory_order_relaxed) || b.ready.empty()) {
    b.current = -1;
    Context::change(b.fibers[from].context, b.caller);
  }
  const size_t i = b.random() % b.ready.size();
  std::swap(b.ready[i], b.ready.back());
  b.current = b.ready.back();
  b.ready.pop_back();
  if (other_block) {
    Context::change(b.fibers[from].context, b.caller);
  } else if (b.current != from) {
    Context::change(b.fibers[from].context, b.fibers[b.current].context);
  }
}

inline void pause() {  // another may run
  block->ready.push_back(block->current);
  next();
}

// What another block has to do is not done yet.
inline void wait_for_another() {
  if (kThreads) sched_yield();
  block->ready.push_back(block->current);
  next(!kThreads && block->together);
}

// At each look at another block's data, also at one that will find it, and where such data are written.
inline void look() {
  constexpr int kSeldom = 16;
  Block& b = *block;
  const bool slow = delayed == b.number;
  if (slow && kThreads) return std::this_thread::sleep_for(std::chrono::microseconds(20));
  if (slow || (b.together && b.random() % kSeldom == 0)) wait_for_another();
}

inline void meet(Barrier& barrier) {
  Block& b = *block;
  if (int(barrier.waiting.size()) + 1 < barrier.needed) {
    barrier.waiting.push_back(b.current);
    next();
    return;
  }
  b.ready.insert(b.ready.end(), barrier.waiting.begin(), barrier.waiting.end());
  barrier.waiting.clear();
  pause();
}

inline void fiber_main() {
  Block& b = *block;
  b.body();
  b.left--;
  // A thread that has left is not waited for.
  for (Barrier* barrier : {&b.barriers[b.current / 32], &b.barriers.back()}) {
    barrier->needed--;
    if (barrier->needed > 0 && int(barrier->waiting.size()) == barrier->needed) {
      b.ready.insert(b.ready.end(), barrier->waiting.begin(), barrier->waiting.end());
      barrier->waiting.clear();
    }
  }
  next();
  std::abort();
}

// Ready for its threads to begin.
inline void prepare(Block& b, dim3 grid, int number, int threads, size_t shared_bytes,
                    const std::function<void()>& body) {
  const dim3 index{number % grid.x, number / grid.x % grid.y, number / (grid.x * grid.y)};
  b.index = index, b.grid = grid, b.number = number, b.body = body, b.left = threads;
  b.random.seed(seed.load() * 7919u + unsigned(number));
  b.ready.clear();
  b.fibers.resize(threads);
  b.lanes.resize(threads);
  b.barriers.assign(threads / 32 + 1, {});
  for (auto& barrier : b.barriers) barrier.needed = 32;
  for (auto& barrier : b.numbered) barrier.waiting.clear();
  b.barriers.back().needed = threads;
  b.shared.reset(new uint4[shared_bytes / 16]);  // just as much: a sanitizer sees who goes beyond
  std::memset(static_cast<void*>(b.shared.get()), 0xff, shared_bytes / 16 * 16);  // NaN
  for (int i = 0; i < threads; i++) {
    Fiber& f = b.fibers[i];
    if (!f.stack) f.stack.reset(new char[kStack]);
    f.context.make(f.stack.get(), kStack, fiber_main);
    if (i) b.ready.push_back(i);
  }
  b.current = 0;
}

// A block's threads until all have left, all wait for each other or fail (its current is then below 0), or
// some wait for another block.
inline void resume(Block& b) {
  block = &b;
  b.caller.adopt();
  Context::change(b.caller, b.fibers[b.current].context);
  block = nullptr;
}

// In turns, as long as there are any; false where some have not come to their end.
inline bool take_turns(std::vector<Block>& blocks) {
  constexpr int kSlower = 50;
  std::minstd_rand random(seed.load());
  std::vector<Block*> running;
  for (Block& b : blocks) running.push_back(&b);
  while (!running.empty()) {
    Block*& b = running[random() % running.size()];
    if (b->number == delayed && running.size() > 1 && random() % kSlower) continue;
    resume(*b);
    if (b->current >= 0) continue;
    if (b->left) return false;
    std::swap(b, running.back());
    running.pop_back();
  }
  return true;
}

// together: all blocks at once. False where it did not come to an end.
template <class K, class... A>
bool launch(bool together, dim3 grid, int threads, size_t shared_bytes, K kernel, A... args) {
  failed = false;
  seed++;
  const std::function<void()> body = [=] { kernel(args...); };
  const int blocks = int(grid.x * grid.y * grid.z);
  std::atomic<bool> ok{true};
  if (!together) {
    thread_local Block b;
    for (int i = 0; i < blocks; i++) {
      prepare(b, grid, i, threads, shared_bytes, body);
      resume(b);
      ok = b.left == 0 && ok;
    }
    return ok;
  }
  Together others{std::vector<Block*>(blocks), std::vector<std::atomic<int>>(grid.x * grid.z)};
  std::vector<Block> each(blocks);
  for (int i = 0; i < blocks; i++) {
    others.blocks[i] = &each[i];
    each[i].together = &others;
    prepare(each[i], grid, i, threads, shared_bytes, body);
  }
  if (!kThreads) return take_turns(each);
  std::vector<std::thread> all;
  for (Block& b : each)
    all.emplace_back([&] {
      resume(b);
      if (b.left) ok = false, failed = true;
    });
  for (auto& thread : all) thread.join();
  return ok;
}

inline Block& here() { return *block; }
struct ThreadIndex {
  int x;
};
inline ThreadIndex thread_index() { return {block->current}; }
inline Barrier& warp() { return block->barriers[block->current / 32]; }
inline Lane& lane(int i) { return block->lanes[block->current / 32 * 32 + i]; }

}  // namespace emulated

#define threadIdx (emulated::thread_index())
#define blockIdx (emulated::here().index)
#define gridDim (emulated::here().grid)
#define FASTRNN_SHARED(name) uint4* const name = emulated::here().shared.get()

inline void __syncthreads() { emulated::meet(emulated::here().barriers.back()); }
inline void __syncwarp() { emulated::meet(emulated::warp()); }
inline uint32_t __shfl_down_sync(uint32_t, uint32_t v, int by) {
  const int own = threadIdx.x % 32;
  emulated::lane(own).word[0] = v;
  emulated::meet(emulated::warp());
  const uint32_t found = emulated::lane(own + by < 32 ? own + by : own).word[0];
  emulated::meet(emulated::warp());
  return found;
}

inline uint32_t __shfl_sync(uint32_t, uint32_t v, int from) {
  emulated::lane(threadIdx.x % 32).word[0] = v;
  emulated::meet(emulated::warp());
  const uint32_t found = emulated::lane(from).word[0];
  emulated::meet(emulated::warp());
  return found;
}

namespace fastrnn::cuda {

inline void give_up() {
  emulated::failed = true;
  emulated::next();
}

inline uint4 load_relaxed(const void* p) {
  emulated::look();
  uint32_t* word = static_cast<uint32_t*>(const_cast<void*>(p));
  uint4 v;
  for (auto [to, i] : {std::pair{&v.x, 0}, {&v.y, 1}, {&v.z, 2}, {&v.w, 3}})
    *to = std::atomic_ref(word[i]).load(std::memory_order_relaxed);
  if (v.x == ~0u || v.y == ~0u || v.z == ~0u || v.w == ~0u) emulated::wait_for_another();
  return v;
}
inline void store_relaxed(void* p, uint32_t v) {
  emulated::look();
  std::atomic_ref(*static_cast<uint32_t*>(p)).store(v, std::memory_order_relaxed);
}
inline float load_shared_float(const void* p) { return *static_cast<const float*>(p); }
inline void store_shared(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }
inline uint4 load_shared(const void* p) { return *static_cast<const uint4*>(p); }

inline void meet_some(int number, int threads) {
  emulated::Barrier& barrier = emulated::here().numbered[number];
  barrier.needed = threads;
  emulated::meet(barrier);
}

constexpr bool kClusters = true;
// An arrival: turns that are over << 33 | bytes expected less those that came, which before it is expected
// are below 0, + 2^32 << 1 | whether it is expected.
constexpr uint64_t kNone = uint64_t(1) << 33, kTurn = uint64_t(1) << 34;
inline void change_arrival(uint64_t* arrival, int64_t bytes, bool expected) {
  std::atomic_ref<uint64_t> word(*arrival);
  uint64_t before = word.load(std::memory_order_relaxed), after;
  do {
    after = before + uint64_t(bytes * 2) + (expected ? 1 : 0);
    if ((after & (kTurn - 1)) == (kNone | 1)) after = (after - 1) + kTurn;
  } while (!word.compare_exchange_weak(before, after, std::memory_order_acq_rel));
}
inline void start_arrival(uint64_t* arrival) { *arrival = kNone; }
inline void expect(uint64_t* arrival, int bytes) { change_arrival(arrival, bytes, true); }
inline void await(uint64_t* arrival, int parity, int patience) {
  emulated::look();
  std::atomic_ref<uint64_t> word(*arrival);
  while (int(word.load(std::memory_order_acquire) / kTurn % 2) == parity) {
    if (--patience < 0) return give_up();
    emulated::wait_for_another();
  }
}
inline void push(char* place, uint4 v, uint64_t* arrival, int peer, bool there) {
  if (!there) return;
  emulated::look();
  const emulated::Block& own = emulated::here();
  const int number = int(own.index.x + own.grid.x * (peer + own.grid.y * own.index.z));
  char* const theirs = reinterpret_cast<char*>(own.together->blocks[number]->shared.get());
  const char* const mine = reinterpret_cast<char*>(own.shared.get());
  std::memcpy(theirs + (place - mine), &v, 16);
  change_arrival(reinterpret_cast<uint64_t*>(theirs + (reinterpret_cast<char*>(arrival) - mine)), -16, false);
}
inline void meet_cluster() {
  __syncthreads();
  if (threadIdx.x == 0) {
    emulated::Block& own = emulated::here();
    std::atomic<int>& met = own.together->met[own.index.x + own.grid.x * own.index.z];
    const int all = int(own.grid.y) * ++own.meetings;
    for (met++; met.load() < all && !emulated::failed;) emulated::wait_for_another();
  }
  __syncthreads();
}

inline char* beyond(const char* p, int a, int b) { return const_cast<char*>(p) + int64_t(a) * b; }

template <class V>
void pin(V&) {}
inline void load_ahead(const void*) {}
inline void store(uint16_t* p, uint16_t v) { *p = v; }
inline void store(uint32_t* p, uint32_t v) { *p = v; }
inline uint32_t load_word(const uint16_t* p) { return *p; }
inline uint32_t load_word(const uint32_t* p) { return *p; }
inline uint16_t load_early(const uint16_t* p) { return *p; }
inline uint32_t load_early(const uint32_t* p) { return *p; }

inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline uint16_t bf16_bits(float x) {
  const uint32_t bits = float_bits(x);
  return x == x ? uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : uint16_t(0x7fff);
}
inline uint16_t fp16_bits(float x) {
  if (x != x) return 0x7fff;
  const _Float16 half = _Float16(x);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
inline float fp16_float(uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return float(half);
}
inline float bf16_float(uint16_t bits) { return bits_float(uint32_t(bits) << 16); }
inline uint32_t tf32_bits(float x) {
  const uint32_t bits = float_bits(x);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}

// One tile's product: the lanes tell their parts, then each sums its four of the 16 x 8 results over k.
// element: of a word of a lane's part, the value at this of its PER places.
template <int PER, class F>
void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
         F element) {
  const int own = threadIdx.x % 32;
  emulated::lane(own) = {{a0, a1, a2, a3, b0, b1}};
  emulated::meet(emulated::warp());
  float sum[4];
  for (int i = 0; i < 4; i++) {
    const int row = own / 4 + i / 2 * 8, column = own % 4 * 2 + i % 2;
    sum[i] = c[i];
    for (int k = 0; k < 8 * PER; k++) {
      const int quarter = k / PER % 4, half = k / (4 * PER);
      sum[i] += element(emulated::lane(row % 8 * 4 + quarter).word[row / 8 + 2 * half], k % PER) *
                element(emulated::lane(column * 4 + quarter).word[4 + half], k % PER);
    }
  }
  emulated::meet(emulated::warp());
  for (int i = 0; i < 4; i++) c[i] = sum[i];
}
inline void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                     uint32_t b1) {
  mma<2>(c, a0, a1, a2, a3, b0, b1, [](uint32_t v, int i) { return bf16_float(uint16_t(v >> 16 * i)); });
}
inline void mma_fp16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                     uint32_t b1) {
  mma<2>(c, a0, a1, a2, a3, b0, b1, [](uint32_t v, int i) { return fp16_float(uint16_t(v >> 16 * i)); });
}
inline void mma_tf32(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                     uint32_t b1) {
  mma<1>(c, a0, a1, a2, a3, b0, b1, [](uint32_t v, int) { return bits_float(v); });
}

}  // namespace fastrnn::cuda
