// What the CUDA ops need in addition to tensors.h: the device guard, the stream and scratch memory.
#pragma once
#ifndef DML_CUDA_EMULATOR
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(std::int32_t device_index, void** stream);
#endif

#include "cuda/ops.h"
#include "tensors.h"

namespace dml::cuda {

#ifdef DML_CUDA_EMULATOR
inline bool on_device(const Tensor& t) { return t.is_cpu(); }

struct Launch {
  explicit Launch(const Tensor&) {}
  Stream stream = nullptr;
};
#else
inline bool on_device(const Tensor& t) { return t.is_cuda(); }

// Makes the tensor's device the current one, and holds that device's current stream.
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

struct Gpu {
  static constexpr const char* name = "the GPU";
  static constexpr bool excludes_pairs = false;
  static bool holds(const Tensor& t) { return on_device(t); }
};

struct Checked : CheckedOn<Gpu> {
  // A result of the forward, contiguous and of the accumulation type.
  static Vector result(const Tensor& t, std::int64_t n, bool wide, const char* name) {
    STD_TORCH_CHECK(has_shape(t, {n}) && t.is_contiguous() && t.scalar_type() == accumulation(wide),
                    "dml_kernels: ", name, " must be ", n, " contiguous values of the accumulation type");
    return vector(t, n, name);
  }
};

// A matrix as kernels whose sums are in fp64 read it: one of another dtype is read value by value.
inline Matrix widened(Matrix m, bool wide) {
  if (wide && m.dtype != Dtype::f64) m.load_width = 1;
  return m;
}

// Sums are in fp64 where either side is fp64, and in fp32 otherwise.
inline Comparison comparison_of(const Tensor& x, const Tensor& w, std::int64_t metric, bool normalize, double eps) {
  const Matrix rows = Checked::matrix(x, "x"), bank = Checked::matrix(w, "w");
  STD_TORCH_CHECK(rows.cols == bank.cols && rows.cols > 0, "dml_kernels: x and w must have the same embedding size");
  STD_TORCH_CHECK(bank.rows > 0, "dml_kernels: w has no rows");
  const bool wide = rows.dtype == Dtype::f64 || bank.dtype == Dtype::f64;
  const Metric kind = choice<Metric>(metric, 3, "metric");
  return {widened(rows, wide), widened(bank, wide), kind, normalize, wide, eps};
}

// Scratch memory from torch's allocator, so that it belongs to the stream and to a graph under capture.
struct Scratch {
  Scratch(const Tensor& like, std::size_t bytes)
      : memory(torch::stable::new_empty(like, {std::int64_t((bytes + 7) / 8)}, ScalarType::Double)) {}
  void* data() const { return memory.numel() ? memory.mutable_data_ptr() : nullptr; }
  Tensor memory;
};

}  // namespace dml::cuda
