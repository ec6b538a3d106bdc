// Scratch memory of a call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace fastrnn::cpu {

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

}  // namespace fastrnn::cpu
