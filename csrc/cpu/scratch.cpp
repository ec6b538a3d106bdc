#include "scratch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastrnn::cpu {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kPooled = false;  // a block for each piece, so that the sanitizer sees its ends
#else
constexpr bool kPooled = true;
#endif
constexpr size_t kLine = 64, kLeast = 64 << 10;
// One block for each of a few Python threads; what is larger goes back to the system after its call.
constexpr int kKept = 2;
constexpr size_t kMostKept = 64 << 20;

struct Header {
  size_t size;
};
// No lock: a forked child would inherit it locked by a thread that it does not have.
std::atomic<void*> kept[kKept];

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

void* fresh(size_t size) {
  void* p = std::aligned_alloc(kLine, round_up(size, kLine));
  if (!p) throw std::bad_alloc();
  ask_for_large_pages(p, size);
  return p;
}

}  // namespace

void ask_for_large_pages(void* data, size_t size) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t from = reinterpret_cast<uintptr_t>(data), to = from + size;
  const uintptr_t first = round_up(from, kPage);
  if (to > first && to - first >= kPage) {
    madvise(reinterpret_cast<void*>(first), (to - first) / kPage * kPage, MADV_HUGEPAGE);
  }
#else
  (void)data, (void)size;
#endif
}

Arena::Arena() {
  if (!kPooled) return;
  for (auto& place : kept) {
    void* p = place.exchange(nullptr, std::memory_order_acquire);
    if (!p) continue;
    blocks_.push_back({p, static_cast<Header*>(p)->size});
    used_ = kLine;
    return;
  }
}

Arena::~Arena() {
  if (!kPooled) {
    for (const Block& b : blocks_) std::free(b.data);
    return;
  }
  // One block that would have held all, where several were needed.
  if (blocks_.size() > 1) {
    const size_t all = before_ + used_;
    for (const Block& b : blocks_) std::free(b.data);
    blocks_.clear();
    if (all <= kMostKept) {
      const size_t size = std::min(round_up(all + all / 4, kLine), kMostKept);
      void* p = std::aligned_alloc(kLine, size);
      if (p) {
        ask_for_large_pages(p, size);
        blocks_.push_back({p, size});
      }
    }
  }
  if (blocks_.empty()) return;
  const Block b = blocks_.back();
  if (b.size <= kMostKept) {
    static_cast<Header*>(b.data)->size = b.size;
    void* p = b.data;
    for (auto& place : kept) {
      p = place.exchange(p, std::memory_order_acq_rel);
      if (!p) return;
    }
    std::free(p);
    return;
  }
  std::free(b.data);
}

void* Arena::bytes(size_t size) {
  size = round_up(size, kLine);
  if (!kPooled || blocks_.empty() || used_ + size > blocks_.back().size) {
    const size_t block = kPooled ? std::max(size + kLine, kLeast) : size + kLine;
    void* p = fresh(block);
    before_ += used_;
    used_ = kLine;
    blocks_.push_back({p, block});
  }
  void* p = static_cast<char*>(blocks_.back().data) + used_;
  used_ += size;
  return p;
}

}  // namespace fastrnn::cpu
