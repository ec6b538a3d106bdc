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

void meet(Place* places, int member, int members) {
  Place& own = places[member];
  const unsigned now = ++own.met;
  for (int round = 0, way = 1; way < members; ++round, way *= 2) {
    places[(member + way) % members].told[round].store(now, std::memory_order_release);
    // The one before may already be at the next meeting.
    spin_until([&] { return static_cast<int>(own.told[round].load(std::memory_order_acquire) - now) >= 0; });
  }
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
  const std::unique_ptr<Place[]> places(new Place[2 * want]());
  std::atomic<int64_t> covered{0};
  torch::stable::parallel_for(0, want, 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    places[begin].first = true;
    covered.fetch_add(end - begin, std::memory_order_acq_rel);
    spin_until([&] { return covered.load(std::memory_order_acquire) == want; });
    Team team{0, 0, places.get()};
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
  asm volatile("msr fpcr, %0" ::"r"(before_ | (uint64_t{1} << 24)));
}
FlushDenormals::~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(before_)); }
#else
FlushDenormals::FlushDenormals() : before_(0) {}
FlushDenormals::~FlushDenormals() = default;
#endif

}  // namespace fastrnn::cpu
