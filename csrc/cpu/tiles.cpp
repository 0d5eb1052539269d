#include "tiles.h"

#include <numeric>

namespace dml::cpu {

Plan Plan::of(std::int64_t n, std::int64_t m, std::int64_t d, std::int64_t element_size, Cut cut, std::int64_t group) {
  constexpr std::int64_t widest = 512, most_slices = 16, tile_bytes = 512 << 10, part_bytes = 32 << 20;
  constexpr std::int64_t fewest_rows = 128;  // of a slice, because each slice of rows loads the bank
  const auto up = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
  Plan plan;
  plan.rows = n;
  plan.by_rows = cut == Cut::longer_side && n >= 4 * m && n >= 2 * fewest_rows;
  // Each slice keeps a part of the gradient of the side that is not cut, in the accumulation type. The parts take at
  // most 32 MB together, but there are never fewer than 4 slices.
  const std::int64_t kept = (plan.by_rows ? m : n) * d * std::max<std::int64_t>(element_size, 4);
  const std::int64_t slices = std::clamp<std::int64_t>(part_bytes / std::max<std::int64_t>(kept, 1), 4, most_slices);
  plan.tile_columns = std::clamp(up(plan.by_rows ? m : up(m, slices), 16) * 16, std::int64_t{64}, widest);
  const std::int64_t even = std::lcm(std::int64_t{16}, group), step = even <= plan.tile_columns ? even : group;
  plan.tile_columns = std::max(plan.tile_columns / step, std::int64_t{1}) * step;
  plan.row_block =
      std::clamp<std::int64_t>(tile_bytes / (plan.tile_columns * element_size), 16, std::max<std::int64_t>(n, 16));
  plan.tiles = up(m, plan.tile_columns);
  plan.slices = std::min(plan.by_rows ? n / fewest_rows : plan.tiles, slices);
  return plan;
}

}  // namespace dml::cpu
