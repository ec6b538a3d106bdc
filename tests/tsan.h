// Included before every source of a ThreadSanitizer build (./run sanitize). libgomp is not instrumented: what
// its fork and join order would look like a race. Here the calls into torch's pool say so, call by call, and
// add nothing that torch does not promise.
#pragma once

#include <sanitizer/tsan_interface.h>
#include <torch/csrc/stable/c/shim.h>

namespace fastrnn::tsan {

struct Loop {
  ParallelFunc body;
  void* context;
  char join;  // its address, and the struct's own, name the two orders: fork and join
};

inline AOTITorchError parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc body,
                                   void* context) {
  Loop loop{body, context, 0};
  __tsan_release(&loop);
  const auto error = torch_parallel_for(
      begin, end, grain,
      [](int64_t from, int64_t to, void* p) {
        __tsan_acquire(p);
        Loop& l = *static_cast<Loop*>(p);
        l.body(from, to, l.context);
        __tsan_release(&l.join);
      },
      &loop);
  __tsan_acquire(&loop.join);
  return error;
}

}  // namespace fastrnn::tsan

#define torch_parallel_for ::fastrnn::tsan::parallel_for
