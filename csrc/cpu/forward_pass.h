// The forward pass of one layer on the CPU, for those who have a team run its scan.
#pragma once

#include <atomic>

#include "packed.h"

namespace fastrnn::cpu {

struct Outputs {
  Tensor y;
  TensorList last, seq, saved;
};

template <class E, class A>
Plan forward_plan(const LayerArgs& a, int64_t G, bool int8) {
  // A product of int8 weights takes a quarter of the time.
  const int64_t row_work = G * a.H / (int8 ? 4 : 1);
  const int64_t weight_bytes = (G + a.projected) * a.H * a.P * (int8 ? 1 : sizeof(A));
  return Plan(a, a.B * row_work * a.P, a.D * a.N * row_work * (a.I + a.P), weight_bytes,
              ceil_div(a.H, kernels<E, A>().width), a.B == 1 ? Plan::kLeastCallOfOne : Plan::kLeastCall);
}

// Whether x and h of this layer's steps enter one product: its weights are then packed.
template <class E, class A>
bool joint_of(const LayerArgs& a, const CellKernels<E, A>& cell, bool int8) {
  return cell.joins && !int8 && a.T * a.B > Weights<E, A>::few(a, cell.gates) &&
         joint_product(a, cell.gates * a.H * (a.I + a.P) * int64_t{sizeof(A)}, by_tiles<E, A>());
}

// One layer's forward pass: all is ready but the scan, which the caller has a team run.
template <class E, class A = E>
class ForwardPass {
 public:
  // packed: null where the weights are `args.params`. steps: of a chunk; 0: as many as stay in the cache. y:
  // where that of all steps is not wanted, room for those that the caller will run at a time; before each run
  // it moves the scan's dir[0].y.data, and where x has no more steps either x.data, to where row 0 would be.
  ForwardPass(Arena& arena, const CellKernels<E, A>& cell, LayerArgs args, const PackedLayer<E, A>* packed,
              bool save, bool return_states, int64_t steps = 0, const Tensor* y = nullptr)
      : cell_(cell), a_(std::move(args)), table_(a_), int8_(packed && packed->int8()), weights_(arena, a_) {
    const LayerArgs& a = a_;
    const RowTable& table = table_;
    Scan<E, A>& scan = scan_;
    const int64_t H = a.H, P = a.P, D = a.D, N = a.N, G = cell.gates;
    const bool projected = a.projected, bf16 = a.dtype == ScalarType::BFloat16;
    Outputs& out = out_;
    const auto fresh = [&](const Shape& shape, ScalarType dtype) {
      return table.ragged() ? zeros(a.x, shape, dtype) : empty(shape, dtype);
    };
    out.y = y ? *y : fresh(a.row_shape(D * P), a.dtype);
    out.last.reserve(cell.states);
    for (int j = 0; j < cell.states; ++j) out.last.push_back(empty({D, a.B, j ? H : P}, a.dtype));
    if (save || return_states) {
      for (int j = 1; j < cell.states; ++j) out.seq.push_back(fresh(a.seq_shape(), kScalar<E>));
    }
    const bool save_gates = save && cell.saved;
    if (save_gates) {
      out.saved.push_back(pooled<E>({D, N, cell.saved * H}));
      if (projected) out.saved.push_back(pooled<E>({D, N, H}));
    }

    scan.rows = {a.T, a.B, table.active, table.offset,
                 table.outside.empty() ? nullptr : table.outside.data()};
    scan.H = H;
    scan.P = P;
    const int64_t ld = padded<E>(H), ld_h = padded<A>(P), ld_mid = padded<A>(H), columns = G * H;
    const int64_t few = Weights<E, A>::few(a, G);
    const bool direct =
        bf16 == (sizeof(A) == 2) && a.I % kDepth<A> == 0 && table.outside.empty() && a.x.is_contiguous();
    // The cache may still hold where the call before left off.
    static std::atomic<unsigned> sweeps{0};
    scan.sweeps = sweeps.fetch_add(static_cast<unsigned>(a.T), std::memory_order_relaxed);
    scan.I = a.I;
    scan.x = input_of<E>(a);
    scan.steps = steps ? steps : input_steps<E, A>(a, columns);
    scan.k1 = a.T;
    scan.joint = joint_of(a, cell, int8_);
    const int64_t most_rows = scan.steps * a.B;
    for (int64_t d = 0; d < D; ++d) {
      Direction<E, A>& s = scan.dir[d];
      s.reverse = d == 1;
      if (packed) packed->direction(d, s);
      if (scan.joint && !packed) {
        std::tie(s.w_x[0], s.w[0]) = weights_.both(a.params[d].w_ih, a.params[d].w_hh, G, H);
      }
      for (int64_t stage = 0, gate0 = 0; stage < cell.stages && !packed && !scan.joint;
           gate0 += cell.stage_gates[stage++]) {
        const LayerArgs::Direction& p = a.params[d];
        const int64_t gates = cell.stage_gates[stage];
        s.w_x[stage] = weights_.get(p.w_ih, gate0 * H * a.I, by_rows(gates, H, a.I, a.I));
        s.w[stage] = weights_.get(p.w_hh, gate0 * H * P, by_rows(gates, H, P, P), few);
      }
      s.ld_x = padded<A>(a.I);
      s.x_rows = direct ? nullptr : arena.get<A>(most_rows * s.ld_x);
      if (!packed) {
        if (projected) s.w_proj = weights_.get(*a.params[d].w_hr, 0, by_rows(1, P, H, H));
        const LayerArgs::Direction& p = a.params[d];
        if (p.b_ih && H % kWidest<E> == 0 && a.dtype == kScalar<E>) {
          // Where they lie: a step's call would notice the copies.
          s.bx = static_cast<const E*>(p.b_ih->const_data_ptr());
          s.bh = static_cast<const E*>(p.b_hh->const_data_ptr());
          s.ld_b = H;
        } else {
          E* bx = arena.zeros<E>(G * ld);
          E* bh = arena.zeros<E>(G * ld);
          read_biases(p, G, H, bx, bh);
          s.bx = bx;
          s.bh = bh;
          s.ld_b = ld;
        }
      }
      if (scan.joint) {
        E* b = arena.get<E>(G * s.ld_b);
        for (int64_t i = 0; i < G * s.ld_b; ++i) b[i] = s.bx[i] + s.bh[i];
        s.b = b;
      }
      s.save =
          save_gates ? static_cast<E*>(out.saved[0].mutable_data_ptr()) + d * N * cell.saved * H : nullptr;
      s.gx = scan.joint ? nullptr : arena.get<E>(most_rows * G * ld);
      for (int j = 1; j < cell.states; ++j) {
        s.seq[j - 1] =
            out.seq.empty() ? nullptr : static_cast<E*>(out.seq[j - 1].mutable_data_ptr()) + d * N * H;
      }
      s.raw =
          save_gates && projected ? static_cast<E*>(out.saved[1].mutable_data_ptr()) + d * N * H : nullptr;
      s.y = {static_cast<char*>(out.y.mutable_data_ptr()) + d * P * out.y.element_size(), D * P, bf16};
      if (a.reset) {
        uint8_t* keep = arena.get<uint8_t>(N);
        const bool* cut = static_cast<const bool*>(a.reset->const_data_ptr());
        fill_keep(table, a, s.reverse, cut, keep);
        s.keep = keep;
      }
      s.ld_state = ld;
      s.ld_ring = ld_h;
      for (int j = 0; j < 2; ++j) s.ring[j] = arena.zeros<A>(a.B * ld_h);
      for (int j = 1; j < cell.states; ++j) s.state[j] = arena.zeros<E>(a.B * ld);
      if (projected || cell.stages == 2) s.mid = arena.zeros<A>(a.B * ld_mid);
      s.ld_mid = ld_mid;
      for (int64_t i = 0; i < a.B; ++i) {
        // In reverse no reset cuts a first state: the boundary lies past the sequence's end.
        if (!s.reverse && s.keep && i < table.active[0] && !s.keep[i]) continue;
        read(a.states[0], (d * a.B + table.caller(i)) * P, P, s.ring[0] + i * ld_h);
        std::memcpy(s.ring[1] + i * ld_h, s.ring[0] + i * ld_h, P * sizeof(A));
        for (int j = 1; j < cell.states; ++j) {
          read(a.states[j], (d * a.B + table.caller(i)) * H, H, s.state[j] + i * ld);
        }
      }
    }
  }

  const LayerArgs& args() const { return a_; }
  const Scan<E, A>& scan() const { return scan_; }
  bool int8() const { return int8_; }
  // Floats that a member needs for the rows that its int8 weights meet.
  int64_t quantized() const {
    return int8_ ? scan_.steps * a_.B * int8_row(std::max({a_.I, a_.P, a_.H})) : 0;
  }
  void pack(const Team& team) { weights_.pack(team); }
  // That the scan will have so many threads.
  void share_out(int threads) {
    constexpr int64_t kLine = 64;
    const int64_t row = (cell_.saved + cell_.states - 1) * a_.H * sizeof(E);
    bool lines = a_.H * sizeof(E) % kLine == 0;
    for (const TensorList* kept : {&out_.saved, &out_.seq}) {
      for (const Tensor& t : *kept) lines &= reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kLine == 0;
    }
    for (Direction<E, A>& s : scan_.dir) {
      s.stream = s.save && lines && keeps_past_caches(a_.D * a_.N * row / threads);
    }
  }

  Outputs results() {
    const int64_t P = a_.P, H = a_.H, ld = padded<E>(H);
    for (int64_t d = 0; d < a_.D; ++d) {
      const Direction<E, A>& s = scan_.dir[d];
      for (int64_t i = 0; i < a_.B; ++i) {
        const int64_t to = d * a_.B + table_.caller(i), steps = s.reverse ? a_.T : table_.length(i);
        // Each step writes the other ring, and none a row whose sequence has ended.
        write(s.ring[steps & 1] + i * s.ld_ring, P, out_.last[0], to * P);
        for (int j = 1; j < cell_.states; ++j) write(s.state[j] + i * ld, H, out_.last[j], to * H);
      }
    }
    return std::move(out_);
  }

 private:
  const CellKernels<E, A>& cell_;
  const LayerArgs a_;
  const RowTable table_;
  const bool int8_;
  Weights<E, A> weights_;
  Scan<E, A> scan_{};
  Outputs out_;
};

// A layer alone.
template <class E, class A = E>
Outputs forward(const CellKernels<E, A>& cell, LayerArgs args, const PackedLayer<E, A>* packed, bool save,
                bool return_states) {
  Arena arena;
  ForwardPass<E, A> pass(arena, cell, std::move(args), packed, save, return_states);
  const Plan plan = forward_plan<E, A>(pass.args(), cell.gates, pass.int8());
  pass.share_out(plan.threads());
  const int64_t quantized = pass.quantized();
  float* scratch = arena.get<float>(plan.threads() * quantized);
  run_team(plan.threads(), [&](const Team& team) {
    pass.pack(team);
    Share share = plan.share(team);
    share.quantized = scratch + team.member * quantized;
    cell.forward(pass.scan(), share);
  });
  return pass.results();
}

// The masks of a call; none: all absent.
struct Masks {
  OptionalTensor lengths, batch_sizes, reset;
};

}  // namespace fastrnn::cpu
