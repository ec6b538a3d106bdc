#include "scratch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <iterator>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastrnn::cpu {
namespace {

constexpr size_t kLine = 64, kLeast = 64 << 10;
// One block for each of a few Python threads; what is larger goes back to the system after its call.
constexpr int kKept = 2;
constexpr size_t kMostKept = 64 << 20;

struct Header {
  size_t size;
};
// No locks here: a forked child would inherit one locked by a thread that it does not have.
std::atomic<void*> kept[kKept];

constexpr size_t kPage = 2 << 20;  // a large one
constexpr size_t kMostIdle = 512 << 20;
std::atomic<Block*> idle[16];
std::atomic<size_t> idle_bytes{0};
std::atomic<unsigned> oldest{0};

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

void* fresh(size_t size) {
  void* p = std::aligned_alloc(kLine, round_up(size, kLine));
  if (!p) throw std::bad_alloc();
  ask_for_large_pages(p, size);
  return p;
}

// Begins where a large page does; null: there is none.
void* map(size_t size) {
#if defined(__linux__)
  void* const all = mmap(nullptr, size + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(all);
  const size_t before = round_up(reinterpret_cast<uintptr_t>(all), kPage) - reinterpret_cast<uintptr_t>(all);
  if (before > 0) munmap(begin, before);
  munmap(begin + before + size, kPage - before);
  return begin + before;
#else
  return std::aligned_alloc(kPage, size);
#endif
}

void unmap(Block* block) {
#if defined(__linux__)
  munmap(block->data, block->size);
#else
  std::free(block->data);
#endif
  delete block;
}

// Whether its pages are the system's to take, and the next writer's until then.
bool lend_pages(const Block& block) {
#if defined(MADV_FREE)
  return madvise(block.data, block.size, MADV_FREE) == 0;
#else
  (void)block;
  return false;
#endif
}

Block* taken(std::atomic<Block*>& place) {
  Block* const block = place.exchange(nullptr, std::memory_order_acquire);
  if (block) idle_bytes -= block->size;
  return block;
}

// Into the first place that is free, else in turn into another's.
void keep(Block* block) {
  idle_bytes += block->size;
  for (auto& place : idle) {
    Block* none = nullptr;
    if (place.compare_exchange_strong(none, block, std::memory_order_release)) return;
  }
  Block* const other = idle[oldest++ % std::size(idle)].exchange(block, std::memory_order_acq_rel);
  if (!other) return;
  idle_bytes -= other->size;
  unmap(other);
}

}  // namespace

Block* take_block(size_t size) {
  size = round_up(size, kPage);
  Block* best = nullptr;
  for (auto& place : idle) {
    Block* block = taken(place);
    if (!block) continue;
    const bool fits = block->size >= size && block->size / 2 <= size;
    if (fits && (!best || block->size < best->size)) std::swap(block, best);
    if (block) keep(block);
  }
  if (best) return best;
  void* const data = map(size);
  if (!data) throw std::bad_alloc();
  ask_for_large_pages(data, size);
  return new Block{data, size};
}

void give_back(Block* block) {
  if (block->size > kMostIdle || !lend_pages(*block)) return unmap(block);
  for (size_t i = 0; i < std::size(idle) && idle_bytes + block->size > kMostIdle; ++i) {
    if (Block* const other = taken(idle[oldest++ % std::size(idle)])) unmap(other);
  }
  keep(block);
}

void ask_for_large_pages(void* data, size_t size) {
#if defined(__linux__)
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
