// fastrnn::decoder and its backward pass: what they share. Arguments as ops.cpp has them; dimensions T, B, I,
// H as in scan.h, S memory, K query, L layers.
#pragma once

#include "attention.h"
#include "outer.h"

namespace fastrnn::cpu {

struct DecoderInputs {
  Tensor x, feed, w_h, keys, values;  // [T, B, I], [B, H], [H, H], [S, B, K], [S, B, H]
  TensorList states;                  // [L, B, H]
  std::vector<LayerArgs::Direction> params;
  OptionalTensor w_q, v, mask;  // [K, H], [K], [B, S]
  TensorList drops;             // [T, B, H] of each layer but the last
  double scale;
  int64_t T, B, N, I, H, S, K, L;
  ScalarType dtype;

  // The sizes of layer k, for the plan and the packing of its weights.
  LayerArgs sizes(int64_t k) const {
    LayerArgs a{};
    a.T = T;
    a.B = B;
    a.N = N;
    a.I = k ? H : I;
    a.H = a.P = H;
    a.D = 1;
    a.dtype = dtype;
    return a;
  }
};

// Raises a RuntimeError that says what was expected and what came. params: (w_ih, w_hh, b_ih, b_hh) of each
// layer; the first w_ih is [G*H, I + H].
DecoderInputs check_decoder(const CellShape& cell, const Tensor& x, const TensorList& states,
                            const Tensor& feed, const TensorList& params, const Tensor& w_h,
                            const Tensor& keys, const Tensor& values, const OptionalTensor& w_q,
                            const OptionalTensor& v, const OptionalTensor& mask, const TensorList& drops,
                            double scale);

// A call's scratch, and what both directions of it begin with.
template <class E>
class DecoderCall {
 public:
  DecoderCall(const CellKernels<E>& cell, const DecoderInputs& in)
      : cell_(cell), in_(in), table_(in.sizes(0)), scans_(in.L), memory_(in.B) {
    const int64_t B = in.B, L = in.L;
    p_.cell = &cell;
    p_.layers = static_cast<int>(L);
    p_.scan = scans_.data();
    p_.B = B;
    p_.S = in.S;
    p_.K = in.K;
    p_.memory = memory_.data();
    p_.ld_feed = padded<E>(in.H);
    p_.ld_query = padded<E>(in.K);
    for (int64_t k = 0; k < L; ++k) {
      Scan<E>& s = scans_[k];
      s.rows = {in.T, B, table_.active, table_.offset, nullptr};
      s.H = s.P = in.H;
    }
    if (!in.drops.empty()) {
      const E** drops = arena_.template get<const E*>(L);
      for (int64_t k = 0; k + 1 < L; ++k) drops[k] = data(in.drops[k]);
      p_.drops = drops;
    }
    read_memory();
  }

 protected:
  static E* data(const Tensor& t) { return static_cast<E*>(t.mutable_data_ptr()); }

  // Threads for a scan whose every product has the batch for rows; `weights`, elements of all of them.
  Plan plan(int64_t weights) const {
    const int64_t attention = in_.B * in_.S * (in_.K + in_.H);
    return Plan(in_.sizes(0), in_.B * weights + attention, in_.T * (in_.B * weights + attention),
                weights * static_cast<int64_t>(sizeof(E)), ceil_div(in_.H, cells_.width));
  }

  // Elements of the weights that a step multiplies with.
  int64_t step_weights() const {
    const int64_t G = cell_.gates, H = in_.H;
    return in_.L * 2 * G * H * H + H * H + (in_.w_q ? in_.K * H : 0);
  }

  const CellKernels<E>& cell_;
  const AttentionKernels<E>& kernels_ = attention_kernels<E>();
  const Kernels<E>& cells_ = kernels<E>();
  const DecoderInputs& in_;
  const RowTable table_;
  Arena arena_;
  Weights<E> weights_{arena_, in_.sizes(0)};
  std::vector<Scan<E>> scans_;
  std::vector<Memory<E>> memory_;
  Decoder<E> p_{};

 private:
  // Each sequence's memory up to the last that may be attended to, zeros where it may not.
  void read_memory() {
    const int64_t B = in_.B, S = in_.S, K = in_.K, H = in_.H;
    const bool* mask = in_.mask ? static_cast<const bool*>(in_.mask->const_data_ptr()) : nullptr;
    const int64_t ld_keys = padded<E>(K), ld_values = padded<E>(H);
    E* keys = arena_.template get<E>(B * S * ld_keys);
    E* values = arena_.template get<E>(B * S * ld_values);
    E* v = nullptr;
    if (in_.v) {
      v = arena_.template zeros<E>(ld_keys);
      read(*in_.v, 0, K, v);
    }
    for (int64_t b = 0; b < B; ++b) {
      const bool* own = mask ? mask + b * S : nullptr;
      int64_t length = S;
      while (own && length > 0 && !own[length - 1]) --length;
      if (own && std::find(own, own + length, false) == own + length) own = nullptr;
      memory_[b] = {keys + b * S * ld_keys,
                    values + b * S * ld_values,
                    ld_keys,
                    ld_values,
                    length,
                    K,
                    H,
                    own,
                    v,
                    static_cast<E>(in_.scale),
                    mask != nullptr};
    }
    for_rows(B, S * (K + H), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const Memory<E>& m = memory_[b];
        for (int64_t s = 0; s < m.S; ++s) {
          const bool kept = !m.mask || m.mask[s];
          copy_row(in_.keys, s * B + b, K, kept, const_cast<E*>(m.keys) + s * ld_keys, ld_keys);
          copy_row(in_.values, s * B + b, H, kept, const_cast<E*>(m.values) + s * ld_values, ld_values);
        }
      }
    });
  }

  static void copy_row(const Tensor& from, int64_t row, int64_t width, bool kept, E* to, int64_t ld) {
    if (kept) read(from, row * width, width, to);
    std::fill(to + (kept ? width : 0), to + ld, E(0));
  }
};

}  // namespace fastrnn::cpu
