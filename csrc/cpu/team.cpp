#include "team.h"

#include <sched.h>

#include <memory>

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
  asm volatile("yield");
#endif
}

template <class Done>
void spin_until(Done done) {
  constexpr int kSpins = 400;  // some 10 us; a step's imbalance is less
  for (int i = 0; !done(); ++i) {
    if (i < kSpins) {
      pause();
    } else {
      sched_yield();
    }
  }
}

}  // namespace

void Barrier::wait(int members) {
  const unsigned generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == members - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  spin_until([&] { return generation_.load(std::memory_order_acquire) != generation; });
}

void run_team(int want, void (*body)(void*, int, int), void* context) {
  if (want <= 1) {
    const FlushDenormals flush;
    body(context, 0, 1);
    return;
  }
  // Each thread gets one range of [0, want). How many there are is known once the ranges cover it all; a
  // member's number is the rank of its range, so that from call to call a thread, and the caches of the core
  // that it runs on, keep the same share of the weights.
  std::unique_ptr<std::atomic<bool>[]> begins(new std::atomic<bool>[want]());
  std::atomic<int64_t> covered{0};
  torch::stable::parallel_for(0, want, 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    begins[begin].store(true, std::memory_order_relaxed);
    covered.fetch_add(end - begin, std::memory_order_acq_rel);
    spin_until([&] { return covered.load(std::memory_order_acquire) == want; });
    int member = 0, size = 0;
    for (int i = 0; i < want; ++i) {
      const bool is_begin = begins[i].load(std::memory_order_relaxed);
      member += is_begin && i < begin;
      size += is_begin;
    }
    body(context, member, size);
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
  asm volatile("msr fpcr, %0" ::"r"(before_ | (uint64_t{1} << 24)));
}
FlushDenormals::~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(before_)); }
#else
FlushDenormals::FlushDenormals() : before_(0) {}
FlushDenormals::~FlushDenormals() = default;
#endif

}  // namespace fastrnn::cpu
