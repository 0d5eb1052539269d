// What differs between nvcc and the tests' emulator, which compiles the same kernels for the CPU; and the loads,
// stores, reductions and launches that the kernels share.
#pragma once
#include <math.h>

#include <cstdint>
#include <type_traits>

#include "ops.h"

#ifdef DML_CUDA_EMULATOR
#include "emulator.h"
#define DML_UNROLL
#define DML_UNROLL_BY(n)
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define DML_UNROLL _Pragma("unroll")
#define DML_PRAGMA(text) _Pragma(#text)
#define DML_UNROLL_BY(n) DML_PRAGMA(unroll n)
#define DML_SHARED(T, name, count) __shared__ T name[count]
#define DML_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define DML_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define DML_LAUNCH_COOPERATIVE(kernel, grid, block, shared, stream, ...) \
  launch_cooperative(kernel, grid, block, shared, stream, __VA_ARGS__)
#endif

namespace dml::cuda {

constexpr int warp_lanes = 32;
constexpr int block_threads = 128;  // of every kernel
constexpr unsigned every_lane = 0xffffffffu;

// --- bits of the halves

#ifdef DML_CUDA_EMULATOR
inline float float_of_bits(std::uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
inline float widen_bf16(std::uint16_t bits) { return float_of_bits(std::uint32_t(bits) << 16); }
inline float widen_f16(std::uint16_t bits) {
  _Float16 value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return float(value);
}
inline std::uint16_t narrow_bf16(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return value != value ? 0x7fc0u : std::uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline std::uint16_t narrow_f16(float value) {
  const _Float16 half = _Float16(value);
  std::uint16_t bits;
  __builtin_memcpy(&bits, &half, sizeof bits);
  return bits;
}
#else
__device__ __forceinline__ float widen_bf16(std::uint16_t bits) { return __uint_as_float(std::uint32_t(bits) << 16); }
__device__ __forceinline__ float widen_f16(std::uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ std::uint16_t narrow_bf16(float value) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
__device__ __forceinline__ std::uint16_t narrow_f16(float value) { return __half_as_ushort(__float2half_rn(value)); }
#endif

// --- scalars of any dtype

template <class A>
__device__ __forceinline__ A load(const void* data, Dtype dtype, std::int64_t at) {
  switch (dtype) {
    case Dtype::f32:
      return A(static_cast<const float*>(data)[at]);
    case Dtype::f64:
      return A(static_cast<const double*>(data)[at]);
    case Dtype::bf16:
      return A(widen_bf16(static_cast<const std::uint16_t*>(data)[at]));
    default:
      return A(widen_f16(static_cast<const std::uint16_t*>(data)[at]));
  }
}

template <class A>
__device__ __forceinline__ void store(void* data, Dtype dtype, std::int64_t at, A value) {
  switch (dtype) {
    case Dtype::f32:
      static_cast<float*>(data)[at] = float(value);
      break;
    case Dtype::f64:
      static_cast<double*>(data)[at] = double(value);
      break;
    case Dtype::bf16:
      static_cast<std::uint16_t*>(data)[at] = narrow_bf16(float(value));
      break;
    default:
      static_cast<std::uint16_t*>(data)[at] = narrow_f16(float(value));
  }
}

template <class A>
__device__ __forceinline__ A load(const Vector& v, std::int64_t i, A otherwise) {
  return v.data ? load<A>(v.data, v.dtype, i * v.stride) : otherwise;
}

// Where A is double the matrix may have any dtype; where A is float it is not fp64.
template <class A>
__device__ __forceinline__ A load(const Matrix& m, std::int64_t i, std::int64_t j) {
  const std::int64_t at = i * m.row_stride + j * m.col_stride;
  if constexpr (std::is_same_v<A, double>) {
    return load<double>(m.data, m.dtype, at);
  } else {
    if (m.dtype == Dtype::f32) return static_cast<const float*>(m.data)[at];
    const std::uint16_t half = static_cast<const std::uint16_t*>(m.data)[at];
    return m.dtype == Dtype::bf16 ? widen_bf16(half) : widen_f16(half);
  }
}

// --- several values of a row

template <class A, int count>
struct alignas(16) Run {
  A v[count];
};

template <class A>
using Quad = Run<A, 4>;

template <class A>
struct alignas(2 * sizeof(A)) Pair {
  A v[2];
};

// Columns [j, j + count) of row i, all of which must exist, in the aligned loads that `load_width` allows. Only halves
// are loaded 8 at a time: the threads of a warp read fp32 in adjacent loads of 16 bytes.
template <class A, int count>
__device__ __forceinline__ Run<A, count> load_aligned(const Matrix& m, std::int64_t i, std::int64_t j) {
  const std::int64_t at = i * m.row_stride + j;
  Run<A, count> out;
  if constexpr (std::is_same_v<A, double>) {
    const auto* pairs = reinterpret_cast<const Pair<double>*>(static_cast<const double*>(m.data) + at);
    [[maybe_unused]] const Pair<double> low = pairs[0], high = pairs[1];
    out = {low.v[0], low.v[1], high.v[0], high.v[1]};
  } else {
    if constexpr (count == 4)
      if (m.dtype == Dtype::f32) return *reinterpret_cast<const Quad<float>*>(static_cast<const float*>(m.data) + at);
    const std::uint16_t* halves = static_cast<const std::uint16_t*>(m.data) + at;
    std::uint32_t words[count / 2];
    if constexpr (count == 8) {
      const uint4 bits = *reinterpret_cast<const uint4*>(halves);
      words[0] = bits.x, words[1] = bits.y, words[2] = bits.z, words[3] = bits.w;
    } else {
      const uint2 bits = *reinterpret_cast<const uint2*>(halves);
      words[0] = bits.x, words[1] = bits.y;
    }
    DML_UNROLL
    for (int k = 0; k < count; ++k) {
      const std::uint16_t half = std::uint16_t(words[k / 2] >> (16 * (k % 2)));
      out.v[k] = m.dtype == Dtype::bf16 ? widen_bf16(half) : widen_f16(half);
    }
  }
  return out;
}

// Columns [j, j + count) of row i with any alignment; count is 4 or 8. Columns from `cols` on are 0.
template <class A, int count>
__device__ __forceinline__ Run<A, count> load_run(const Matrix& m, std::int64_t i, std::int64_t j) {
  if (m.load_width >= count && j + count <= m.cols) return load_aligned<A, count>(m, i, j);
  Run<A, count> out;
  DML_UNROLL
  for (int k = 0; k < count; ++k) out.v[k] = j + k < m.cols ? load<A>(m, i, j + k) : A(0);
  return out;
}

// The threads of a warp together call function(run) for all columns of row i.
template <class A, class Function>
__device__ __forceinline__ void over_row(const Matrix& m, std::int64_t i, Function function) {
  const int lane = threadIdx.x % warp_lanes;
  if constexpr (std::is_same_v<A, float>) {
    if (m.load_width == 8) {
      for (std::int64_t k = lane * 8; k < m.cols; k += warp_lanes * 8) function(load_run<A, 8>(m, i, k));
      return;
    }
  }
  for (std::int64_t k = lane * 4; k < m.cols; k += warp_lanes * 4) function(load_run<A, 4>(m, i, k));
}

template <class A, int count>
__device__ __forceinline__ A square(const Run<A, count>& run) {
  A sum = 0;
  DML_UNROLL
  for (int k = 0; k < count; ++k) sum += run.v[k] * run.v[k];
  return sum;
}

// Stores 1, 4 or 8 (only halves) values at once, from `at` on. `at` and the length of the target's rows are multiples
// of `count`.
template <class A, int count>
__device__ __forceinline__ void store_run(Target to, std::int64_t at, const Run<A, count>& run) {
  if constexpr (count == 1) {
    store(to.data, to.dtype, at, run.v[0]);
  } else if constexpr (std::is_same_v<A, double>) {
    auto* pairs = reinterpret_cast<Pair<double>*>(static_cast<double*>(to.data) + at);
    pairs[0] = {run.v[0], run.v[1]}, pairs[1] = {run.v[2], run.v[3]};
  } else {
    if constexpr (count == 4) {
      if (to.dtype == Dtype::f32) {
        *reinterpret_cast<Quad<float>*>(static_cast<float*>(to.data) + at) = run;
        return;
      }
    }
    struct alignas(2 * count) Halves {
      std::uint16_t v[count];
    } halves;
    DML_UNROLL
    for (int k = 0; k < count; ++k)
      halves.v[k] = to.dtype == Dtype::bf16 ? narrow_bf16(run.v[k]) : narrow_f16(run.v[k]);
    *reinterpret_cast<Halves*>(static_cast<std::uint16_t*>(to.data) + at) = halves;
  }
}

// --- reductions: the same order every time

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  DML_UNROLL
  for (int bits = 16; bits; bits /= 2) value += __shfl_xor_sync(every_lane, value, bits);
  return value;
}

// Returns the sum over the block in every thread. `parts` has one value for each warp; it may be reused after the next
// barrier.
template <class T>
__device__ __forceinline__ T block_sum(T value, T* parts) {
  value = warp_sum(value);
  __syncthreads();  // parts of an earlier sum have been read
  if (threadIdx.x % warp_lanes == 0) parts[threadIdx.x / warp_lanes] = value;
  __syncthreads();
  T total = 0;
  for (int w = 0; w < block_threads / warp_lanes; ++w) total += parts[w];
  return total;
}

// max(value, floor), and NaN where the value is NaN.
template <class A>
__device__ __forceinline__ A at_least(A value, A floor) {
  return value < floor ? floor : value;
}

// 1 / max(norm, eps); a NaN norm stays NaN.
template <class A>
__device__ __forceinline__ A inverse_norm(A square, A eps, bool& unit) {
  const A norm = sqrt(square);
  unit = !(norm < eps);
  return A(1) / (unit ? norm : eps);
}

// --- launching

#ifdef DML_CUDA_EMULATOR
inline std::int64_t shared_limit() { return 101376; }
inline std::int64_t processors() { return 8; }
template <class Kernel>
Failure allow_shared(Kernel, std::size_t) {
  return nullptr;
}
template <class Kernel>
std::int64_t resident_blocks(Kernel, std::size_t, std::int64_t wanted) {
  return wanted < 5 ? wanted : 5;
}
inline Failure launch_failure() { return nullptr; }
#else
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

inline std::int64_t shared_limit() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
inline std::int64_t processors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

template <class Kernel>
Failure allow_shared(Kernel kernel, std::size_t bytes) {
  if (bytes <= 32768) return nullptr;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// How many of the wanted blocks a cooperative launch may have: those that the device runs at once.
template <class Kernel>
std::int64_t resident_blocks(Kernel kernel, std::size_t bytes, std::int64_t wanted) {
  const std::int64_t count = processors();
  if (wanted <= count) return wanted;
  int each = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, block_threads, bytes);
  return wanted < each * count ? wanted : each * count;
}

template <class... Parameters>
void launch_cooperative(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared, cudaStream_t stream,
                        std::type_identity_t<Parameters>... arguments) {
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared, config.stream = stream;
  config.attrs = &cooperative, config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, arguments...);  // launch_failure() reports
}

inline Failure launch_failure() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

// Runs function(float{}) or function(double{}).
template <class Function>
Failure with_accumulation(bool wide, Function function) {
  return wide ? function(double{}) : function(float{});
}

}  // namespace dml::cuda
