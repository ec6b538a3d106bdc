// Memory of large pages for what a forward pass keeps until its backward pass. The system takes more time to
// give such memory, page by page and cleared, than it takes to fill (64 MB: 19 ms and 2.5, a Xeon under a
// hypervisor), and the next step of a training wants as much again. So what comes back waits for it, up to 16
// blocks and about half a gigabyte together, and meanwhile the system may take their pages where it wants for
// memory.
#pragma once

#include <cstddef>

namespace fastrnn::cpu {

struct Block {
  void* data;
  size_t size;
};

// At least so large, and up to twice. Null where there is no such memory, or where none would wait: the
// system takes no pages back later (MADV_FREE), or g++'s AddressSanitizer is to see each piece's ends.
Block* take_block(size_t size);
void give_back(Block* block);

}  // namespace fastrnn::cpu
