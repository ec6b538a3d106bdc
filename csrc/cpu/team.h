// A team of threads from torch's own pool, and its barrier.
#pragma once

#include <atomic>
#include <cstdint>

namespace fastrnn::cpu {

// Where one member of a barrier hears from the others, in each round from another one; a line of its own, or
// its neighbours' news would keep it from its own.
struct Place {
  alignas(64) std::atomic<unsigned> told[15];
  alignas(64) std::atomic<unsigned> asleep;  // 1 while it sleeps
  alignas(64) std::atomic<int> core;         // that it came to its last meeting on; 0: none yet
  unsigned met;
  bool first;  // of its thread's range, see run_team
};

// A barrier of `members`, all of which call it with the same places [members] and none other: in round r each
// tells the one 2^r after it (Hensgen, Finkel and Manber, "Two algorithms for barrier synchronization",
// 1988). Two members need one round, of one cache line each way. Waiting, it spins for a while, then sleeps;
// at once where it would keep the member it waits for from their common core.
void meet(Place* places, int member, int members);

// One thread's part in a team.
struct Team {
  int member, size;
  Place* places;  // [2 * size]: the team's, then those of groups within it

  void meet() const {
    if (size > 1) cpu::meet(places, member, size);
  }
  // The places of a group of consecutive members, from `begin` on.
  Place* group(int begin) const { return places + size + begin; }
};

// The most that a team of this thread's may have.
int team_threads();

// Runs body(context, team) on up to `want` threads; every member runs at once, so they may meet. The size is
// derived from the threads that really arrive: one inside another parallel region or a forked child. The body
// must not throw, nor allocate: the others would wait for ever where it is to meet them. So that ends the
// program.
void run_team(int want, void (*body)(void*, const Team&), void* context);

template <class F>
void run_team(int want, F&& f) {
  run_team(want, [](void* context, const Team& team) noexcept { (*static_cast<F*>(context))(team); }, &f);
}

// While it lives, denormal numbers count as zero in this thread: vanishing gradients become denormals, which
// are some 45 times slower to multiply.
class FlushDenormals {
 public:
  FlushDenormals();
  ~FlushDenormals();

 private:
  uint64_t before_;
};

}  // namespace fastrnn::cpu
