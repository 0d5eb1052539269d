// From torch's tensors to the plain types of cuda/ops.h, through libtorch's stable ABI: checks, device guard and stream.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#ifndef DML_CUDA_EMULATOR
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(std::int32_t device_index, void** stream);
#endif

#include <initializer_list>
#include <optional>

#include "arguments.h"
#include "cuda/ops.h"

namespace dml::cuda {

using dml::choice;
using dml::has_shape;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

#ifdef DML_CUDA_EMULATOR
inline bool on_device(const Tensor& t) { return t.is_cpu(); }

struct Launch {
  explicit Launch(const Tensor&) {}
  Stream stream = nullptr;
};
#else
inline bool on_device(const Tensor& t) { return t.is_cuda(); }

// The tensors' device made the current one, and its current stream.
struct Launch {
  explicit Launch(const Tensor& t) : guard(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  }
  torch::stable::accelerator::DeviceGuard guard;
  Stream stream = nullptr;
};
#endif

inline void check(Failure failure, const char* op) {
  STD_TORCH_CHECK(!failure, "dml_kernels: ", op, " on the GPU: ", failure);
}

inline Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Double:
      return Dtype::f64;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, "dml_kernels: ", name, " must be float32, float64, bfloat16 or float16");
      return Dtype::f32;
  }
}

inline Matrix matrix(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && on_device(t), "dml_kernels: ", name, " must be a matrix on the device");
  const Dtype dtype = dtype_of(t, name);
  const auto address = reinterpret_cast<std::uintptr_t>(t.const_data_ptr());
  const int bytes = dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
  const auto aligned = [&](int count) {
    const std::uintptr_t load = count * bytes < 16 ? count * bytes : 16;
    return t.stride(1) == 1 && t.stride(0) % count == 0 && address % load == 0;
  };
  const int load_width = bytes == 2 && aligned(8) ? 8 : aligned(4) ? 4 : 1;
  return {t.const_data_ptr(), dtype, load_width, t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

inline Vector vector(const Tensor& t, std::int64_t n, const char* name) {
  STD_TORCH_CHECK((t.dim() == 0 || (t.dim() == 1 && t.size(0) == n)) && on_device(t), "dml_kernels: ", name,
                  " must have ", n, " elements on the device");
  return {t.const_data_ptr(), dtype_of(t, name), t.dim() == 0 ? 0 : t.stride(0)};
}

inline Vector vector(const OptionalTensor& t, std::int64_t n, const char* name) {
  return t ? vector(*t, n, name) : Vector{};
}

inline Vector vector_unless_empty(const Tensor& t, std::int64_t n, const char* name) {
  return t.numel() == 0 ? Vector{} : vector(t, n, name);
}

inline const std::int64_t* integers(const Tensor& t, std::int64_t n, const char* name) {
  STD_TORCH_CHECK(
      t.dim() == 1 && t.size(0) == n && t.is_contiguous() && t.scalar_type() == ScalarType::Long && on_device(t),
      "dml_kernels: ", name, " must be ", n, " contiguous int64 on the device");
  return t.const_data_ptr<std::int64_t>();
}

inline const std::int64_t* integers(const OptionalTensor& t, std::int64_t n, const char* name) {
  return t ? integers(*t, n, name) : nullptr;
}

// Contiguous and of this shape; or empty where no gradient is wanted.
inline Target target(const Tensor& t, std::initializer_list<std::int64_t> shape, const char* name) {
  if (t.numel() == 0) return {nullptr, Dtype::f32};
  STD_TORCH_CHECK(has_shape(t, shape) && t.is_contiguous() && on_device(t), "dml_kernels: ", name,
                  " has the wrong shape or device");
  return {t.mutable_data_ptr(), dtype_of(t, name)};
}

// A gradient's target, like the tensor that it belongs to.
inline Target target_like(const Tensor& t, const Tensor& like, const char* name) {
  return target(t, {like.size(0), like.size(1)}, name);
}

// Contiguous of the accumulation type.
inline const void* forward_result(const Tensor& t, std::int64_t n, bool wide, const char* name) {
  STD_TORCH_CHECK(has_shape(t, {n}) && t.is_contiguous() && on_device(t) &&
                      t.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
                  "dml_kernels: ", name, " must be ", n, " contiguous values of the accumulation type");
  return t.const_data_ptr();
}

// A matrix for kernels whose sums are in fp64: one of another dtype is widened value by value.
inline Matrix widened(Matrix m, bool wide) {
  if (wide && m.dtype != Dtype::f64) m.load_width = 1;
  return m;
}

// Sums in fp64 where either side is fp64, in fp32 otherwise.
inline Comparison comparison_of(const Tensor& x, const Tensor& w, std::int64_t metric, bool normalize, double eps) {
  const Matrix rows = matrix(x, "x"), bank = matrix(w, "w");
  STD_TORCH_CHECK(rows.cols == bank.cols && rows.cols > 0, "dml_kernels: x and w must have the same embedding size");
  STD_TORCH_CHECK(bank.rows > 0, "dml_kernels: w has no rows");
  const bool wide = rows.dtype == Dtype::f64 || bank.dtype == Dtype::f64;
  const Metric kind = choice<Metric>(metric, 3, "metric");
  return {widened(rows, wide), widened(bank, wide), kind, normalize, wide, eps};
}

inline ScalarType accumulation(bool wide) { return wide ? ScalarType::Double : ScalarType::Float; }

// Scratch memory from torch's allocator, so that it belongs to the stream and to a graph under capture.
struct Scratch {
  Scratch(const Tensor& like, std::size_t bytes)
      : memory(torch::stable::new_empty(like, {std::int64_t((bytes + 7) / 8)}, ScalarType::Double)) {}
  void* data() const { return memory.numel() ? memory.mutable_data_ptr() : nullptr; }
  Tensor memory;
};

}  // namespace dml::cuda
