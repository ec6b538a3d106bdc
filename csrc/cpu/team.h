// A team of threads from torch's own pool, and its barrier.
#pragma once

#include <atomic>
#include <cstdint>

namespace fastrnn::cpu {

// Spins briefly, then yields to the kernel: a neighbour on one of the cores must not cost a time slice per
// step.
class Barrier {
 public:
  void wait(int members);

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> generation_{0};
};

// Runs body(context, member, size) on up to `want` threads; every member runs at once, so they may meet at
// barriers. The size is derived from the threads that really arrive: one inside another parallel region or a
// forked child.
void run_team(int want, void (*body)(void*, int member, int size), void* context);

template <class F>
void run_team(int want, F&& f) {
  run_team(want, [](void* context, int member, int size) { (*static_cast<F*>(context))(member, size); }, &f);
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
