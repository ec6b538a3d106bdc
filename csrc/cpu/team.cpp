#include "team.h"

#include <sched.h>

#include <chrono>
#include <limits>
#include <memory>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <torch/csrc/stable/ops.h>

namespace fastrnn::cpu {
namespace {

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // some ten nanoseconds; `yield` takes no time at all on most cores
#endif
}

// Counted from 1; 0 where the system does not say.
inline int core() {
#if defined(__linux__)
  return sched_getcpu() + 1;
#else
  return 0;
#endif
}

// Spins while `spin()`, then sleeps until `word` changes. Longer than a step's imbalance, and than a sleeper
// takes to wake: else all would sleep in turn. A yield would give the core away for a time slice of some 3 ms
// to a neighbour that computes on, and so at every step.
template <class Done, class Spin>
__attribute__((noinline)) void sleep_until(std::atomic<unsigned>& word, std::atomic<unsigned>& asleep,
                                           Done done, Spin spin) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point end = Clock::now() + std::chrono::microseconds(200);
  while (spin() && Clock::now() < end) {
    for (int i = 0; i < 64; ++i) {
      if (done(word.load(std::memory_order_acquire))) return;
      pause();
    }
  }
  for (;;) {
    asleep.fetch_add(1, std::memory_order_seq_cst);
    const unsigned seen = word.load(std::memory_order_seq_cst);
    const bool over = done(seen);
#if defined(__linux__)
    // Whoever changes the word may still have seen nobody asleep, as it has no fence: hence the time limit.
    constexpr timespec kMost{0, 1000000};
    static_assert(sizeof word == 4, "the system waits on 32 bits");
    if (!over) syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, seen, &kMost, nullptr, 0);
#else
    if (!over) sched_yield();
#endif
    asleep.fetch_sub(1, std::memory_order_relaxed);
    if (over) return;
  }
}

template <class Done, class Spin>
inline void wait_until(std::atomic<unsigned>& word, std::atomic<unsigned>& asleep, Done done, Spin spin) {
  for (int i = 0; i < 100; ++i) {
    if (done(word.load(std::memory_order_acquire))) return;
    pause();
  }
  sleep_until(word, asleep, done, spin);
}

// After a change of `word`.
void wake(std::atomic<unsigned>& word, const std::atomic<unsigned>& asleep) {
#if defined(__linux__)
  if (asleep.load(std::memory_order_relaxed) > 0) {
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, std::numeric_limits<int>::max(), nullptr, nullptr, 0);
  }
#endif
}

}  // namespace

void meet(Place* places, int member, int members) {
  Place& own = places[member];
  const unsigned now = ++own.met;
  own.core.store(core(), std::memory_order_relaxed);
  for (int round = 0, way = 1; way < members; ++round, way *= 2) {
    Place& other = places[(member + way) % members];
    other.told[round].store(now, std::memory_order_release);
    wake(other.told[round], other.asleep);
    const Place& before = places[(member + members - way) % members];
    const auto apart = [&] {
      const int its = before.core.load(std::memory_order_relaxed);
      return its == 0 || its != core();
    };
    // The one before may already be at the next meeting.
    const auto done = [&](unsigned told) { return static_cast<int>(told - now) >= 0; };
    wait_until(own.told[round], own.asleep, done, apart);
  }
}

int team_threads() {
#ifdef FASTRNN_ONE_POOL
  // All of torch's callers share one pool of threads: two teams with a part of it each would wait for ever.
  return 1;
#else
  return static_cast<int>(torch::stable::get_num_threads());
#endif
}

void run_team(int want, void (*body)(void*, const Team&), void* context) {
  if (want <= 1) {
    const FlushDenormals flush;
    body(context, {0, 1, nullptr});
    return;
  }
  // Each thread gets one range of [0, want). How many there are is known once the ranges cover it all; a
  // member's number is the rank of its range, so that from call to call a thread, and the caches of the core
  // that it runs on, keep the same share of the weights.
  constexpr int kFew = 8;  // on the stack: the heap aligns slowly
  Place few[kFew]{};
  const std::unique_ptr<Place[]> many(2 * want > kFew ? new Place[2 * want]() : nullptr);
  Place* const places = many ? many.get() : few;
  std::atomic<unsigned> covered{0}, asleep{0};
  torch::stable::parallel_for(0, want, 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    places[begin].first = true;
    covered.fetch_add(static_cast<unsigned>(end - begin), std::memory_order_acq_rel);
    wake(covered, asleep);
    wait_until(
        covered, asleep, [&](unsigned n) { return n == static_cast<unsigned>(want); }, [] { return true; });
    Team team{0, 0, places};
    for (int i = 0; i < want; ++i) {
      team.member += places[i].first && i < begin;
      team.size += places[i].first;
    }
    body(context, team);
  });
}

#if defined(__x86_64__)
FlushDenormals::FlushDenormals() : before_(_mm_getcsr()) {
  _mm_setcsr(static_cast<unsigned>(before_) | 0x8040);  // FTZ and DAZ
}
FlushDenormals::~FlushDenormals() { _mm_setcsr(static_cast<unsigned>(before_)); }
#elif defined(__aarch64__)
FlushDenormals::FlushDenormals() {
  asm volatile("mrs %0, fpcr" : "=r"(before_));
  asm volatile("msr fpcr, %0" ::"r"(before_ | (uint64_t{1} << 24)));  // FZ: of operands and results alike
}
FlushDenormals::~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(before_)); }
#else
FlushDenormals::FlushDenormals() : before_(0) {}
FlushDenormals::~FlushDenormals() = default;
#endif

}  // namespace fastrnn::cpu
