#include "blocks.h"

#include "scratch.h"

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <iterator>
#include <memory>
#endif

#if defined(MADV_FREE)

namespace fastrnn::cpu {
namespace {

constexpr size_t kPage = 2 << 20;  // a large one
constexpr size_t kMostIdle = 512 << 20;

// No locks: a forked child would inherit one locked by a thread that it does not have.
struct Place {
  std::atomic<Block*> block{nullptr};
  // The block's, or that of one before it: a hint, so that only what may fit is taken out.
  std::atomic<size_t> size{0};
};
Place idle[16];
std::atomic<size_t> idle_bytes{0};
std::atomic<unsigned> turn{0};

void unmap(Block* block) {
  munmap(block->data, block->size);
  delete block;
}

Block* taken(Place& place) {
  Block* const block = place.block.exchange(nullptr, std::memory_order_acquire);
  if (block) idle_bytes -= block->size;
  return block;
}

// Into the first place that is free, else in turn into another's.
void put(Block* block) {
  const size_t size = block->size;
  idle_bytes += size;
  for (Place& place : idle) {
    Block* none = nullptr;
    if (!place.block.compare_exchange_strong(none, block, std::memory_order_release)) continue;
    place.size = size;
    return;
  }
  Place& place = idle[turn++ % std::size(idle)];
  Block* const other = place.block.exchange(block, std::memory_order_acq_rel);
  place.size = size;
  if (!other) return;
  idle_bytes -= other->size;
  unmap(other);
}

void unmap_idle() {
  for (Place& place : idle) {
    if (Block* const block = taken(place)) unmap(block);
  }
}

// Begins where a large page does. Null: there is none.
Block* map(size_t size) {
  auto block = std::make_unique<Block>();
  void* const all = mmap(nullptr, size + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(all);
  const size_t before = (kPage - reinterpret_cast<uintptr_t>(all) % kPage) % kPage;
  if (before > 0) munmap(begin, before);
  munmap(begin + before + size, kPage - before);
  ask_for_large_pages(begin + before, size);
  *block = {begin + before, size};
  return block.release();
}

bool lend(const Block& block) { return madvise(block.data, block.size, MADV_FREE) == 0; }

bool system_takes_pages() {
  Block* const block = map(kPage);
  if (!block) return false;
  const bool lent = lend(*block);
  unmap(block);
  // Before a fork nothing waits: parent and child would copy each page that either writes to. The child's
  // count may be wrong for a thread that it does not have.
  if (lent) pthread_atfork(unmap_idle, nullptr, [] { unmap_idle(), idle_bytes = 0; });
  return lent;
}
// Asked when the library is loaded: a local one's guard is a lock.
const bool waits = system_takes_pages();

}  // namespace

Block* take_block(size_t size) {
  if (!waits || size > SIZE_MAX / 2) return nullptr;
  size = (size + kPage - 1) / kPage * kPage;
  const auto fits = [&](size_t s) { return s >= size && s / 2 <= size; };
  Place* best = nullptr;
  size_t smallest = SIZE_MAX;
  for (Place& place : idle) {
    const size_t s = place.block.load(std::memory_order_relaxed) ? place.size.load() : 0;
    if (fits(s) && s < smallest) best = &place, smallest = s;
  }
  if (Block* const block = best ? taken(*best) : nullptr) {
    if (fits(block->size)) return block;
    put(block);
  }
  if (Block* const block = map(size)) return block;
  unmap_idle();  // their addresses, and what the system has promised for them
  return map(size);
}

void give_back(Block* block) {
  if (block->size > kMostIdle || !lend(*block)) return unmap(block);
  for (size_t i = 0; i < std::size(idle) && idle_bytes + block->size > kMostIdle; ++i) {
    if (Block* const other = taken(idle[turn++ % std::size(idle)])) unmap(other);
  }
  put(block);
}

}  // namespace fastrnn::cpu

#else

namespace fastrnn::cpu {
Block* take_block(size_t) { return nullptr; }
void give_back(Block*) {}
}  // namespace fastrnn::cpu

#endif
