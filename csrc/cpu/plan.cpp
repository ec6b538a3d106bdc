#include "plan.h"

#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

namespace fastrnn::cpu {
namespace {

// Linux writes it there for every processor; the C library knows x86 alone.
int64_t ask_system() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  if (const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE); bytes > 0) return bytes;
#endif
  long long kilobytes = 0;
  if (FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index2/size", "r")) {
    if (std::fscanf(file, "%lldK", &kilobytes) != 1) kilobytes = 0;
    std::fclose(file);
  }
  return kilobytes > 0 ? kilobytes << 10 : 1 << 20;
}

int64_t steps_of(const LayerArgs& a, int64_t rows) {
  return std::clamp<int64_t>(rows / std::max<int64_t>(a.B, 1), 1, a.T);
}

}  // namespace

int64_t second_level_cache() {
  static const int64_t bytes = std::clamp<int64_t>(ask_system(), 256 << 10, 4 << 20);
  return bytes;
}

int64_t chunk_steps(const LayerArgs& a, int64_t row_bytes) {
  const int64_t rows = second_level_cache() / std::max<int64_t>(row_bytes, 1);
  return steps_of(a, std::clamp<int64_t>(rows, 128, 512));
}

int64_t input_steps(const LayerArgs& a, int64_t columns, size_t element) {
  const int64_t bytes = second_level_cache() / 8 * 3;  // W and R take the rest
  return steps_of(a, bytes / std::max<int64_t>((a.I + columns) * static_cast<int64_t>(element), 1));
}

Plan::Plan(const LayerArgs& a, int64_t step, int64_t call, int64_t weight_bytes, int64_t blocks)
    : D_(a.D), T_(a.T), B_(a.B), weight_bytes_(weight_bytes), blocks_(blocks) {
  // A step shorter than its barrier, or a call shorter than waking a team, is better run alone.
  constexpr int64_t kLeastStep = 16384, kLeastCall = 100000;
  const int64_t most = std::max<int64_t>(1, std::min(a.D * step / kLeastStep, call / kLeastCall));
  threads_ = static_cast<int>(std::min<int64_t>(torch::stable::get_num_threads(), most));
  // More parts of the units than vectors of them would have nothing to do but meet.
  while (threads_ > 1 && split(threads_).units > std::max<int64_t>(blocks_, 1)) --threads_;
}

Plan::Split Plan::split(int threads) const {
  constexpr int64_t kShort = 8;     // steps
  constexpr int64_t kRowsEach = 6;  // those of a register tile
  const int directions = D_ > 1 && threads % D_ == 0 ? static_cast<int>(D_) : 1, each = threads / directions;
  if (T_ > kShort) {
    // As few parts of the units, and barriers, as leave R in the cache, beside what the steps read and write.
    for (int units = 1; units < each; ++units) {
      const int rows = each / units;
      if (each % units == 0 && B_ >= kRowsEach * rows &&
          weight_bytes_ / units <= second_level_cache() * 3 / 5 && blocks_ >= units) {
        return {directions, rows, units};
      }
    }
  }
  return {directions, 1, each};
}

Share Plan::share(const Team& team) const {
  const Split parts = split(team.size);
  const int each = parts.rows * parts.units, index = team.member % each;
  const int direction = team.member / each, row = index / parts.units;
  Share s{};
  s.dir0 = parts.directions > 1 ? direction : 0;
  s.dir1 = parts.directions > 1 ? direction + 1 : static_cast<int>(D_);
  s.row0 = B_ * row / parts.rows;
  s.row1 = B_ * (row + 1) / parts.rows;
  s.part = index % parts.units;
  s.parts = parts.units;
  s.places = team.group(team.member - s.part);
  return s;
}

}  // namespace fastrnn::cpu
