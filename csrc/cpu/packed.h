// Weights packed for good: what fastrnn::pack writes and fastrnn::layer_packed reads. A tensor of the inputs'
// type, which begins with a head; its other bytes are what `direction` says.
#pragma once

#include <cstddef>

#include "workspace.h"

namespace fastrnn::cpu {

struct PackedHead {
  static constexpr uint64_t kMagic = 0x366b6361706e7266;  // "frnpack6"
  uint64_t magic;
  int64_t bytes, vector_bytes;  // of all, head included; of the instruction set's registers
  LayerSizes sizes;
  Packing packing;
  bool int8;
  char cell[32];
};

template <class E, class A = E>
class PackedLayer {
 public:
  // Room for a layer; `direction` then says where its weights are to be written.
  PackedLayer(const CellKernels<E, A>& cell, const LayerSizes& sizes, bool int8, ScalarType dtype)
      : cell_(cell), head_{PackedHead::kMagic, 0, vector_bytes(), sizes, packing(), int8, {}} {
    std::strncpy(head_.cell, cell.name, sizeof head_.cell - 1);
    Direction<E, A> end{};
    head_.bytes = direction(sizes.D, end);
    data_ = empty({head_.bytes / (dtype == ScalarType::BFloat16 ? 2 : int64_t{sizeof(E)})}, dtype);
    std::memset(data_.mutable_data_ptr(), 0, head_.bytes);
    std::memcpy(data_.mutable_data_ptr(), &head_, sizeof head_);
  }

  PackedLayer(const CellKernels<E, A>& cell, const Tensor& data) : cell_(cell), head_{}, data_(dense(data)) {
    const char* const expected = "weights must be what fastrnn::pack gave";
    const int64_t bytes = data_.numel() * data_.element_size();
    STD_TORCH_CHECK(data_.is_cpu() && bytes >= int64_t{sizeof head_}, expected);
    std::memcpy(&head_, data_.const_data_ptr(), sizeof head_);
    STD_TORCH_CHECK(head_.magic == PackedHead::kMagic && head_.bytes == bytes, expected);
    head_.cell[sizeof head_.cell - 1] = '\0';
    const std::string found = head_.cell;  // a message of other bytes could not be read
    STD_TORCH_CHECK(std::all_of(found.begin(), found.end(), [](unsigned char c) { return c < 0x80; }),
                    expected);
    STD_TORCH_CHECK(cell.name == found, "the weights were packed for the cell ", found, ", got ", cell.name);
    STD_TORCH_CHECK(whole(), expected);
    STD_TORCH_CHECK(head_.vector_bytes == vector_bytes(), "the weights were packed for vectors of ",
                    head_.vector_bytes, " bytes, this processor's kernels take those of ", vector_bytes(),
                    " (", instruction_set().name, "): freeze or quantize the layer here");
    STD_TORCH_CHECK(head_.packing == packing(), "the weights were packed for another instruction set than ",
                    instruction_set().name, ": freeze the layer here");
  }

  const LayerSizes& sizes() const { return head_.sizes; }
  bool int8() const { return head_.int8; }
  const Tensor& data() const { return data_; }

  // Fills in direction d's weights and biases; returns where they end.
  int64_t direction(int64_t d, Direction<E, A>& s) const {
    const LayerSizes& n = head_.sizes;
    const int64_t ld = padded<E>(n.H);
    int64_t at = ceil_div(sizeof head_, kAlign) * kAlign;
    char* base = data_.defined() ? static_cast<char*>(data_.mutable_data_ptr()) : nullptr;
    const auto get = [&]<class T>(T, int64_t count) {
      T* p = base ? reinterpret_cast<T*>(base + at) : nullptr;
      at += ceil_div(count * sizeof(T), kAlign) * kAlign;
      return p;
    };
    const auto weight = [&](int gates, int64_t units, int64_t K) -> Weight<A> {
      const int width = kernels<E, A>().width;
      const int64_t block = head_.int8 ? int8_block(K, gates, width) : apart<A>(K) * gates * width;
      const A* p = get(A{}, ceil_div(units, width) * block);
      if (head_.int8) return {p, Weight<A>::kInt8, 0, &instruction_set().int8};
      return {p, Weight<A>::kPacked, block_rows<A>(K)};
    };
    for (int64_t i = 0; i <= d && i < n.D; ++i) {
      if (cell_.joins && !head_.int8) {
        const int64_t width = kernels<E, A>().width, gates = cell_.gates;
        const A* both = get(A{}, ceil_div(n.H, width) * joint_rows<A>(n.I, n.P) * gates * width);
        if (both) std::tie(s.w_x[0], s.w[0]) = two_of(both, n.I, n.P, gates, width, packing());
      }
      for (int stage = 0; stage < cell_.stages && (!cell_.joins || head_.int8); ++stage) {
        s.w_x[stage] = weight(cell_.stage_gates[stage], n.H, n.I);
        s.w[stage] = weight(cell_.stage_gates[stage], n.H, n.P);
      }
      if (n.projected) s.w_proj = weight(1, n.P, n.H);
      s.bx = get(E{}, cell_.gates * ld);
      s.bh = get(E{}, cell_.gates * ld);
      s.ld_b = ld;
    }
    return at;
  }

 private:
  static constexpr int64_t kAlign = 64;
  // Its sizes are those that its bytes are of, whatever a file or a program made of it.
  bool whole() const {
    const LayerSizes& n = head_.sizes;
    for (const bool* flag : {&n.projected, &head_.int8}) {  // bytes from outside, of any value
      unsigned char byte;
      std::memcpy(&byte, flag, 1);
      if (byte > 1) return false;
    }
    const int64_t most = int64_t{1} << 24;
    if (n.I < 0 || n.H < 1 || n.P < 1 || n.I > most || n.H > most || n.P > most || n.D < 1 || n.D > 2)
      return false;
    if (n.projected ? cell_.states != 2 : n.P != n.H) return false;
    if (head_.int8 && sizeof(A) != sizeof(float)) return false;
    Direction<E, A> s{};
    const bool here = head_.vector_bytes == vector_bytes() && head_.packing == packing();
    return !here || direction(n.D, s) == head_.bytes;
  }
  static int64_t vector_bytes() { return kernels<E, A>().width * int64_t{sizeof(E)}; }
  static Packing packing() { return kernels<E, A>().packing; }

  const CellKernels<E, A>& cell_;
  PackedHead head_;
  Tensor data_;
};

}  // namespace fastrnn::cpu
