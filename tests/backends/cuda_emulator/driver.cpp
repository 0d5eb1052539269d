// Runs a case of the kernels of one source file on the emulator, under a sanitizer: driver CASE DTYPE. Every array is
// an allocation of its exact size. Compiled with -DDRIVE_<file> for csrc/cuda/<file>.cu.
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/ops.h"
#include "emulator.h"

namespace {

using namespace dml;
using namespace dml::cuda;

std::vector<std::unique_ptr<char[]>> kept;

void* allocate(std::size_t bytes) {
  kept.emplace_back(new char[bytes]);
  std::memset(kept.back().get(), 0x7f, bytes);
  return kept.back().get();
}

struct Kind {
  Dtype dtype;
  bool wide;
  std::size_t size() const { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }
  std::size_t sum_size() const { return wide ? 8 : 4; }
};

Kind kind_of(const std::string& name) {
  if (name == "f64") return {Dtype::f64, true};
  if (name == "bf16") return {Dtype::bf16, false};
  return {Dtype::f32, false};
}

std::mt19937 generator(1);

void fill(void* data, Kind kind, std::size_t n) {
  std::normal_distribution<float> normal;
  for (std::size_t i = 0; i < n; ++i) {
    const float value = normal(generator);
    if (kind.dtype == Dtype::f64) static_cast<double*>(data)[i] = value;
    if (kind.dtype == Dtype::f32) static_cast<float*>(data)[i] = value;
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (kind.dtype == Dtype::bf16) static_cast<std::uint16_t*>(data)[i] = std::uint16_t(bits >> 16);
  }
}

Matrix matrix(Kind kind, std::int64_t rows, std::int64_t cols) {
  void* data = allocate(rows * cols * kind.size());
  fill(data, kind, rows * cols);
  return {data, kind.dtype, rows, cols, cols, 1, kind.size() == 2 && cols % 8 == 0 ? 8 : cols % 4 == 0 ? 4 : 1};
}

[[maybe_unused]] Target target(Kind kind, std::int64_t n) { return {allocate(n * kind.size()), kind.dtype}; }

[[maybe_unused]] void* accumulated(Kind kind, std::int64_t n) { return allocate(n * kind.sum_size()); }

[[maybe_unused]] Vector vector(Kind kind, std::int64_t n) {
  const Kind sum{kind.wide ? Dtype::f64 : Dtype::f32, kind.wide};
  void* data = accumulated(kind, n);
  fill(data, sum, n);
  return {data, sum.dtype, 1};
}

[[maybe_unused]] std::int64_t* integers(std::int64_t n, std::int64_t below) {
  auto* data = static_cast<std::int64_t*>(allocate(n * 8));
  for (std::int64_t i = 0; i < n; ++i) data[i] = generator() % below;
  return data;
}

Failure drive(const std::string& what, Kind kind) {
  // These sizes give partial tiles of both sides and several blocks; the forward also has several slices of the bank
  // with several tiles each.
#if defined(DRIVE_lse_forward)
  const std::int64_t m = 300;
#else
  [[maybe_unused]] const std::int64_t m = 70;
#endif
  [[maybe_unused]] const std::int64_t n = 21, d = what == "wide"             ? 150
                                                  : what.find("narrow") == 0 ? 5
                                                  : kind.size() == 2         ? 40
                                                                             : 36;
  [[maybe_unused]] const bool dot = what.find("dot") != std::string::npos;
  [[maybe_unused]] const Comparison comparison{
      matrix(kind, n, d), matrix(kind, m, d), dot ? Metric::dot : Metric::euclidean, true, kind.wide, 1e-12};
#if defined(DRIVE_lse_forward) || defined(DRIVE_lse_backward)
  const bool proxy_nca = what.find("proxy_nca") != std::string::npos;
  const Labels labels{integers(n, m), nullptr, integers(n, m), -100};
  const LogitArgs args{1, 0, 1, 0, vector(kind, n), vector(kind, m)};
  const ProxyNca loss{proxy_nca, false, 0.1, vector(kind, n), Reduction::mean, accumulated(kind, 1)};
#endif
#if defined(DRIVE_lse_forward)
  void* scratch = allocate(lse_forward_bytes(n, m));
  const LseOut out{accumulated(kind, n), accumulated(kind, n), accumulated(kind, n), accumulated(kind, n)};
  return lse_forward(comparison, labels, args, out, loss, scratch, nullptr);
#elif defined(DRIVE_lse_backward)
  const LseGrads grads{vector(kind, n), vector(kind, n), vector(kind, n),
                       vector(kind, n), vector(kind, n), vector(kind, n)};
  const LseTargets targets{target(kind, n * d), target(kind, m * d), target(kind, n), target(kind, m)};
  return lse_backward(comparison, labels, args, grads, targets, loss, allocate(backward_bytes(comparison)), nullptr);
#elif defined(DRIVE_distance)
  if (what.find("backward") == std::string::npos) return distance_forward(comparison, target(kind, n * m), nullptr);
  return distance_backward(comparison, matrix(kind, n, m), target(kind, n * d), target(kind, m * d), nullptr, nullptr);
#elif defined(DRIVE_normalize)
  if (what.find("backward") == std::string::npos)
    return normalize_forward(comparison.x, 1e-12, target(kind, n * d), nullptr);
  return normalize_backward(matrix(kind, n, d), comparison.x, 1e-12, target(kind, n * d), nullptr);
#elif defined(DRIVE_magnet_forward) || defined(DRIVE_magnet_backward)
  const bool given = what.find("given") != std::string::npos;
  MagnetArgs args{comparison.x,
                  given ? matrix(kind, 9, d) : Matrix{},
                  integers(n, 9),
                  integers(9, 4),
                  9,
                  -100,
                  {},
                  1,
                  1e-6,
                  1e-12,
                  true,
                  Reduction::mean};
#if defined(DRIVE_magnet_forward)
  const MagnetOut out{accumulated(kind, 1), accumulated(kind, n), accumulated(kind, 1)};
  return magnet_forward(args, out, allocate(magnet_forward_bytes(args)), nullptr);
#else
  return magnet_backward(args, vector(kind, n), vector(kind, n).data,
                         {target(kind, n * d), given ? target(kind, 9 * d) : Target{}, target(kind, 1)},
                         allocate(magnet_backward_bytes(args)), nullptr);
#endif
#endif
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  try {
    if (const Failure failure = drive(arguments[1], kind_of(arguments[2]))) {
      std::printf("failed: %s\n", failure);
      return 1;
    }
  } catch (const emulator::Error& error) {
    std::printf("emulator: %s\n", error.what());
    return 1;
  }
  std::printf("clean after %ld launches\n", emulator::machine().launches);
}
