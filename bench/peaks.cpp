// peaks THREADS: what so many cores reach at once, the sum of their best of several tries; JSON for
// limits.py.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float V __attribute__((vector_size(W * sizeof(float))));
// Independent accumulators hide the latency of a multiply-add; each starts from another number, or the
// compiler would keep one of them.
constexpr int N = 12;

volatile float sink;

void use(V v) {
  for (int w = 0; w < W; ++w) sink = v[w];
}

template <class Work>
double rate(double units, Work work) {
  auto start = std::chrono::steady_clock::now();
  work();
  return units / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / 1e9;
}

template <class Once>
double together(int threads, Once once) {
  std::atomic<int> ready{0};
  std::vector<double> best(threads);
  std::vector<std::thread> team;
  for (int t = 0; t < threads; ++t)
    team.emplace_back([&, t] {
      auto tried = once();
      ++ready;
      while (ready < threads) std::this_thread::yield();
      for (int i = 0; i < 30; ++i) best[t] = std::max(best[t], tried());
    });
  for (auto& thread : team) thread.join();
  double sum = 0;
  for (double b : best) sum += b;
  return sum;
}

auto multiply_adds() {
  return [] {
    constexpr long reps = 500000;
    V a[N], x = V{} + 0.999f, y = V{} + 0.001f;
    for (int k = 0; k < N; ++k) a[k] = V{} + float(k);
    return rate(2.0 * W * N * reps, [&] {
      for (long i = 0; i < reps; ++i)
#pragma GCC unroll 12
        for (int k = 0; k < N; ++k) a[k] = a[k] * x + y;
      for (int k = 0; k < N; ++k) use(a[k]);
    });
  };
}

// Up and down in turns, as a scan may sweep its weights: what was read last is still in the nearer cache.
auto reads(std::size_t bytes) {
  constexpr int K = 8;
  return [bytes, p = std::vector<float>(bytes / sizeof(float) + W, 1.0f)] {
    auto address = (reinterpret_cast<std::uintptr_t>(p.data()) + sizeof(V) - 1) / sizeof(V) * sizeof(V);
    auto* v = reinterpret_cast<const V*>(address);
    std::size_t n = bytes / sizeof(V), turns = std::max<std::size_t>(2, (8 << 20) / bytes);
    return rate(2.0 * bytes * turns, [=] {
      V a[K] = {};
      for (std::size_t turn = 0; turn < turns; ++turn) {
        for (std::size_t i = 0; i < n; i += K)
#pragma GCC unroll 8
          for (int k = 0; k < K; ++k) a[k] += v[i + k];
        for (std::size_t i = n; i > 0; i -= K)
#pragma GCC unroll 8
          for (int k = 0; k < K; ++k) a[k] += v[i - 1 - k];
      }
      for (int k = 0; k < K; ++k) use(a[k]);
    });
  };
}

#if defined(__AVX512BF16__)
auto pairs() {
  return [] {
    constexpr long reps = 500000;
    __m512 a[N];
    const auto x = (__m512bh)_mm512_set1_epi32(0x3f003f00);
    for (int k = 0; k < N; ++k) a[k] = _mm512_set1_ps(float(k));
    return rate(2.0 * 2 * W * N * reps, [&] {
      for (long i = 0; i < reps; ++i)
#pragma GCC unroll 12
        for (int k = 0; k < N; ++k) a[k] = _mm512_dpbf16_ps(a[k], x, x);
      for (int k = 0; k < N; ++k) use(a[k]);
    });
  };
}
#endif

#if defined(__AMX_BF16__) && defined(__linux__)
bool permitted() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

auto tiles() {
  return [] {
    struct alignas(64) {
      std::uint8_t palette = 1, start = 0, reserved[14] = {};
      std::uint16_t colsb[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
    constexpr long reps = 20000;
    double found = rate(6.0 * 2 * 16 * 16 * 32 * reps, [] {
      for (long i = 0; i < reps; ++i) {
        _tile_dpbf16ps(0, 6, 7);
        _tile_dpbf16ps(1, 6, 7);
        _tile_dpbf16ps(2, 6, 7);
        _tile_dpbf16ps(3, 6, 7);
        _tile_dpbf16ps(4, 6, 7);
        _tile_dpbf16ps(5, 6, 7);
      }
    });
    _tile_release();
    return found;
  };
}
#endif

int main(int, char** argv) {
  int threads = std::atoi(argv[1]);
  std::printf("{\"gflops\": {\"float32\": %.1f", together(threads, multiply_adds));
  double bfloat16 = 0;
#if defined(__AVX512BF16__)
  bfloat16 = together(threads, pairs);
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
  if (permitted()) bfloat16 = together(threads, tiles);
#endif
  if (bfloat16 > 0) std::printf(", \"bfloat16\": %.1f", bfloat16);
  std::printf("}, \"read\": [");
  for (std::size_t bytes = 16 << 10; bytes <= 16 << 20; bytes *= 2)
    std::printf("%s[%zu, %.1f]", bytes > 16 << 10 ? ", " : "", bytes,
                together(threads, [=] { return reads(bytes); }));
  std::printf("]}\n");
}
