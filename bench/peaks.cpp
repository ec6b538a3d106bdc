// peaks THREADS: what so many cores reach at once, the sum of their best of several tries, and what it costs
// them to wait for each other, the best too; JSON for limits.py.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sched.h>
#include <sys/mman.h>
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
typedef std::int32_t Bits __attribute__((vector_size(W * sizeof(float))));
// Independent accumulators hide the latency of a multiply-add; each starts from another number, or the
// compiler would keep one of them.
constexpr int N = 12;

volatile float sink;

void use(V v) {
  for (int w = 0; w < W; ++w) sink = v[w];
}

template <class Work>
double seconds(Work work) {
  auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

template <class Work>
double rate(double units, Work work) {
  return units / seconds(work) / 1e9;
}

// Gives this thread, one of a team, a core of its own: two new ones may else share one for long.
void take_core([[maybe_unused]] int member) {
#if defined(__linux__)
  cpu_set_t allowed, one;
  CPU_ZERO(&one);
  if (sched_getaffinity(0, sizeof allowed, &allowed)) return;
  int skip = member % CPU_COUNT(&allowed);
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &allowed) && skip-- == 0) CPU_SET(cpu, &one);
  }
  sched_setaffinity(0, sizeof one, &one);
#endif
}

template <class Once>
double together(int threads, Once once) {
  std::atomic<int> ready{0};
  std::vector<double> best(threads);
  std::vector<std::thread> team;
  for (int t = 0; t < threads; ++t)
    team.emplace_back([&, t] {
      take_core(t);
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

// A gate function as the kernels have them: e^-x, of a polynomial and a power of two, and a reciprocal.
// Rough: with the digits that bfloat16 needs.
template <bool kRough>
V sigmoid(V x) {
  const V magic = V{} + 12582912.0f;  // adding it rounds to an integer in the low bits
  V shifted = x * -1.44269504f + magic, n = shifted - magic, r = -x - n * 0.693147182f;
  V p = V{} + 4.16668533e-2f;
  if (!kRough) p = (1.39012850e-3f * r + 8.36314038e-3f) * r + p;
  p = (p * r + 1.66665773e-1f) * r + 0.5f;
  V e = p * (r * r) + (r + 1.0f), d = 1.0f + (V)((Bits)e + ((Bits)shifted << 23));
#if defined(__AVX512F__)
  V y = (V)_mm512_maskz_rcp14_ps(0xffff, (__m512)d);
  return kRough ? y : y + y * (1.0f - d * y);
#else
  return 1.0f / d;
#endif
}

template <bool kRough>
auto activations() {
  return [] {
    constexpr long reps = 50000;
    V a[N];
    for (int k = 0; k < N; ++k) a[k] = V{} + float(k) / N;
    return rate(1.0 * W * N * reps, [&] {
      for (long i = 0; i < reps; ++i)
#pragma GCC unroll 12
        for (int k = 0; k < N; ++k) a[k] = sigmoid<kRough>(a[k]);
      for (int k = 0; k < N; ++k) use(a[k]);
    });
  };
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Floats = std::unique_ptr<V[], Free>;

// Ones; in large pages where the system has them, as the library asks for too.
Floats ones(std::size_t bytes) {
  constexpr std::size_t page = 2 << 20;
  Floats p(static_cast<V*>(std::aligned_alloc(page, (bytes + page - 1) / page * page)));
#if defined(MADV_HUGEPAGE)
  madvise(p.get(), bytes, MADV_HUGEPAGE);
#endif
  std::fill_n(p.get(), bytes / sizeof(V), V{} + 1.0f);
  return p;
}

std::size_t turns_of(std::size_t bytes) { return std::max<std::size_t>(2, (8 << 20) / bytes); }

// Up and down in turns, as a scan may sweep its weights: what was read last is still in the nearer cache.
auto reads(std::size_t bytes) {
  constexpr int K = 8;
  return [bytes, p = ones(bytes)] {
    const V* v = p.get();
    std::size_t n = bytes / sizeof(V), turns = turns_of(bytes);
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

// The same of a matrix in torch's layout whose rows meet a vector, as a step of few sequences reads weights.
auto dots(std::size_t bytes) {
  constexpr std::size_t K = 8, columns = 256 * sizeof(float) / sizeof(V);
  return [bytes, p = ones(bytes)] {
    const V* v = p.get();
    V h[columns];
    for (std::size_t c = 0; c < columns; ++c) h[c] = V{} + float(c);
    std::size_t blocks = bytes / sizeof(V) / columns / K, turns = turns_of(bytes);
    return rate(2.0 * bytes * turns, [&, v] {
      V sum{};
      const auto block = [&](const V* rows) {
        V a[K] = {};
        for (std::size_t c = 0; c < columns; ++c)
#pragma GCC unroll 8
          for (std::size_t k = 0; k < K; ++k) a[k] += rows[k * columns + c] * h[c];
        for (std::size_t k = 0; k < K; ++k) sum += a[k];
      };
      for (std::size_t turn = 0; turn < turns; ++turn) {
        for (std::size_t b = 0; b < blocks; ++b) block(v + b * K * columns);
        for (std::size_t b = blocks; b > 0; --b) block(v + (b - 1) * K * columns);
      }
      use(sum);
    });
  };
}

// Of bytes that are read; packing weights cannot be faster.
auto copies() {
  constexpr std::size_t bytes = 1 << 20;
  return [from = std::vector<char>(bytes, 1), to = std::vector<char>(bytes)]() mutable {
    return rate(bytes, [&] {
      std::memcpy(to.data(), from.data(), bytes);
      sink = to[bytes / 2];
    });
  };
}

// Seconds of a barrier in which member m tells the one 2^r after it, in round r. As in a step, each then
// reads what the others wrote before it.
double meeting(int threads) {
  if (threads < 2) return 0;
  constexpr int most = 16, meetings = 50, vectors = 512 / sizeof(V);
  struct Place {
    alignas(64) std::atomic<int> told[most];
    alignas(64) V written[2][vectors];  // in turns: another may still read those before
  };
  auto places = std::make_unique<Place[]>(threads);
  for (int t = 0; t < threads; ++t)
    for (auto& told : places[t].told) told = 0;
  std::atomic<bool> over{false};
  double best = 1;
  const auto member = [&](int t) {
    take_core(t);
    int met = 0;
    V sum{};
    const auto meet = [&] {
      ++met;
      for (V& v : places[t].written[met % 2]) v = V{} + float(met);
      for (int r = 0, far = 1; far < threads; ++r, far *= 2) {
        places[(t + far) % threads].told[r].store(met, std::memory_order_release);
        // It yields, as others may have the core that it waits for.
        for (int spins = 0; places[t].told[r].load(std::memory_order_acquire) < met; ++spins)
          if (spins > 10000) std::this_thread::yield();
      }
      for (int other = 1; other < threads; ++other)
        for (const V& v : places[(t + other) % threads].written[met % 2]) sum += v;
    };
    // Others may have one of the cores for a while.
    for (double spent = 0;;) {
      if (t == 0) over = spent > 0.2;
      double took = seconds(meet);
      if (over) break;
      took += seconds([&] {
        for (int k = 0; k < meetings; ++k) meet();
      });
      if (t == 0) best = std::min(best, took / (meetings + 1));
      spent += took;
    }
    use(sum);
  };
  std::vector<std::thread> team;
  for (int t = 0; t < threads; ++t) team.emplace_back(member, t);
  for (auto& thread : team) thread.join();
  return best;
}

// Seconds of a parallel region with nothing to do, whose threads still spin from the one before; torch's
// threads are OpenMP's.
double waking([[maybe_unused]] int threads) {
  double best = 0;
#if defined(_OPENMP)
  constexpr int regions = 10, tries = 50;
  best = 1;
  for (int i = 0; i < tries; ++i) {
    double took = seconds([&] {
      for (int k = 0; k < regions; ++k) {
#pragma omp parallel num_threads(threads)
        asm volatile("" ::: "memory");
      }
    });
    best = std::min(best, took / regions);
  }
#endif
  return best;
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
  std::printf("}");
  const auto sweep = [&](const char* name, std::size_t most, auto reading) {
    std::printf(", \"%s\": [", name);
    for (std::size_t bytes = 16 << 10; bytes <= most; bytes *= 2)
      std::printf("%s[%zu, %.1f]", bytes > 16 << 10 ? ", " : "", bytes,
                  together(threads, [=] { return reading(bytes); }));
    std::printf("]");
  };
  sweep("read", 64 << 20, reads);
  sweep("dot", 16 << 20, dots);
  std::printf(", \"activations\": {\"float32\": %.2f, \"bfloat16\": %.2f}, \"copy\": %.1f",
              together(threads, activations<false>), together(threads, activations<true>),
              together(threads, copies));
  std::printf(", \"meet\": %.3g, \"wake\": %.3g}\n", meeting(threads), waking(threads));
}
