// Scratch memory of a call, and memory that goes from one call to another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace fastrnn::cpu {

#if defined(__SANITIZE_ADDRESS__)
inline constexpr bool kPooled = false;  // a block for each piece, so that the sanitizer sees its ends
#else
inline constexpr bool kPooled = true;
#endif

// Where the system lends large pages on request, asks for them: megabytes then take a page fault and an entry
// of the processor's tables every 2 MB instead of every 4 KB.
void ask_for_large_pages(void* data, size_t size);

// Hands out memory that lives as long as a call. Fresh memory costs a page fault every 4 KB, which is more
// than many a short call computes: so a few blocks are kept for the calls to come.
class Arena {
 public:
  Arena();
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  template <class T>
  T* get(int64_t count) {
    return static_cast<T*>(bytes(static_cast<size_t>(count > 0 ? count : 1) * sizeof(T)));
  }
  template <class T>
  T* zeros(int64_t count) {
    T* p = get<T>(count);
    if (count > 0) std::memset(p, 0, static_cast<size_t>(count) * sizeof(T));
    return p;
  }

 private:
  struct Block {
    void* data;
    size_t size;
  };
  void* bytes(size_t size);

  std::vector<Block> blocks_;  // the last one is being handed out
  size_t used_ = 0, before_ = 0;
};

// Memory of large pages, megabytes, for what a forward pass keeps until its backward pass. The system takes
// more time to give such memory, page by page and cleared, than it takes to fill (64 MB: 19 ms and 2.5, a
// Xeon under a hypervisor), and the next step of a training wants as much again. So what comes back is kept
// for it, some blocks of up to half a gigabyte together, and the system may take their pages meanwhile, when
// it wants for memory.
struct Block {
  void* data;
  size_t size;
};
// At least so large. Throws std::bad_alloc.
Block* take_block(size_t size);
void give_back(Block* block);

}  // namespace fastrnn::cpu
