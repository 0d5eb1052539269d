// What differs between nvcc and the tests' emulator (which compiles the same kernels for the CPU), and launching.
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
#define DML_LAUNCH_TOGETHER(kernel, grid, block, shared, stream, ...) \
  launch_together(kernel, grid, block, shared, stream, __VA_ARGS__)
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

// A matrix is fp64 where A is double, and never otherwise.
template <class A>
__device__ __forceinline__ A load(const Matrix& m, std::int64_t i, std::int64_t j) {
  const std::int64_t at = i * m.row_stride + j * m.col_stride;
  if constexpr (std::is_same_v<A, double>) {
    return static_cast<const double*>(m.data)[at];
  } else {
    if (m.dtype == Dtype::f32) return static_cast<const float*>(m.data)[at];
    const std::uint16_t half = static_cast<const std::uint16_t*>(m.data)[at];
    return m.dtype == Dtype::bf16 ? widen_bf16(half) : widen_f16(half);
  }
}

// --- four values

template <class A>
struct alignas(16) Quad {
  A v[4];
};

template <class A>
struct alignas(2 * sizeof(A)) Pair {
  A v[2];
};

// Columns [j, j + 4) of row i, in one load of 16 bytes (8 for halves, two of 16 for double); columns from `cols` on are 0.
template <class A>
__device__ __forceinline__ Quad<A> load_quad(const Matrix& m, std::int64_t i, std::int64_t j) {
  Quad<A> out;
  if (m.quads && j + 4 <= m.cols) {
    const std::int64_t at = i * m.row_stride + j;
    if constexpr (std::is_same_v<A, double>) {
      const auto* pairs = reinterpret_cast<const Pair<double>*>(static_cast<const double*>(m.data) + at);
      [[maybe_unused]] const Pair<double> low = pairs[0], high = pairs[1];
      out = {low.v[0], low.v[1], high.v[0], high.v[1]};
    } else if (m.dtype == Dtype::f32) {
      out = *reinterpret_cast<const Quad<float>*>(static_cast<const float*>(m.data) + at);
    } else {
      const uint2 bits = *reinterpret_cast<const uint2*>(static_cast<const std::uint16_t*>(m.data) + at);
      const std::uint32_t words[2] = {bits.x, bits.y};
      DML_UNROLL
      for (int k = 0; k < 4; ++k) {
        const std::uint16_t half = std::uint16_t(words[k / 2] >> (16 * (k % 2)));
        out.v[k] = m.dtype == Dtype::bf16 ? widen_bf16(half) : widen_f16(half);
      }
    }
    return out;
  }
  DML_UNROLL
  for (int k = 0; k < 4; ++k) out.v[k] = j + k < m.cols ? load<A>(m, i, j + k) : A(0);
  return out;
}

// --- reductions: the same order every time

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  DML_UNROLL
  for (int bits = 16; bits; bits /= 2) value += __shfl_xor_sync(every_lane, value, bits);
  return value;
}

// The sum over the block, in every thread. `parts`: one value a warp, free again after the next barrier.
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
void launch_together(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared, cudaStream_t stream,
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
