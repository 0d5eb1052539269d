// Counter-based noise: a number for (seed, row, column), the same on any tiling, thread count and backend. The hash is
// splitmix64; dml_kernels/noise.py computes the same in PyTorch.
#pragma once
#include <cmath>
#include <cstdint>

#include "portable.h"

namespace dml {

constexpr std::uint64_t noise_gamma = 0x9e3779b97f4a7c15ull;

DML_PORTABLE inline std::uint64_t noise_mix(std::uint64_t h) {
  h = (h ^ (h >> 30)) * 0xbf58476d1ce4e5b9ull;
  h = (h ^ (h >> 27)) * 0x94d049bb133111ebull;
  return h ^ (h >> 31);
}

// The start of a row's stream of numbers.
DML_PORTABLE inline std::uint64_t noise_row(std::uint64_t seed, std::int64_t row) {
  return noise_mix(noise_mix(seed) + std::uint64_t(row) * noise_gamma);
}

DML_PORTABLE inline std::uint64_t noise_bits(std::uint64_t start, std::int64_t column) {
  return noise_mix(start + std::uint64_t(column + 1) * noise_gamma);
}

// The upper 53 bits as a number in (0, 1).
DML_PORTABLE inline double noise_uniform(std::uint64_t bits) { return (double(bits >> 11) + 0.5) * 0x1p-53; }

// Standard Gumbel noise from a uniform number: large where t is small.
DML_PORTABLE inline double gumbel(double t) { return -std::log(-std::log1p(-t)); }

}  // namespace dml
