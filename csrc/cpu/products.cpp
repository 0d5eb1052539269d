#include "products.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/headeronly/util/BFloat16.h>

#include <stdexcept>

namespace dml::cpu {
namespace {

void check(AOTITorchError error, const char* what) {
  if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error(std::string("dml_kernels: PyTorch refused ") + what);
}

template <class P>
std::int32_t dtype();
template <>
std::int32_t dtype<float>() {
  return aoti_torch_dtype_float32();
}
template <>
std::int32_t dtype<double>() {
  return aoti_torch_dtype_float64();
}
template <>
std::int32_t dtype<torch::headeronly::BFloat16>() {
  return aoti_torch_dtype_bfloat16();
}

// A tensor that borrows a tile's memory.
template <class P>
class Borrowed {
 public:
  explicit Borrowed(Mat<P> m) {
    const std::int64_t sizes[] = {m.rows, m.cols}, strides[] = {m.row_stride, m.col_stride};
    auto* data = const_cast<void*>(static_cast<const void*>(m.data));
    check(aoti_torch_create_tensor_from_blob(data, 2, sizes, strides, 0, dtype<std::remove_const_t<P>>(),
                                             aoti_torch_device_type_cpu(), 0, &handle_),
          "a tile");
  }
  ~Borrowed() { aoti_torch_delete_tensor_object(handle_); }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  AtenTensorHandle get() const { return handle_; }

 private:
  AtenTensorHandle handle_ = nullptr;
};

}  // namespace

template <class P>
void multiply(Mat<const P> a, Mat<const P> b, Mat<P> c, bool accumulate) {
  const Borrowed<const P> ta(a), tb(b);
  const Borrowed<P> tc(c);
  if (accumulate) {
    check(aoti_torch_cpu_addmm_out(tc.get(), tc.get(), ta.get(), tb.get(), 1, 1), "a product");
  } else {
    check(aoti_torch_cpu_mm_out(tc.get(), ta.get(), tb.get()), "a product");
  }
}

template void multiply<float>(Mat<const float>, Mat<const float>, Mat<float>, bool);
template void multiply<double>(Mat<const double>, Mat<const double>, Mat<double>, bool);
using torch::headeronly::BFloat16;
template void multiply<BFloat16>(Mat<const BFloat16>, Mat<const BFloat16>, Mat<BFloat16>, bool);

}  // namespace dml::cpu
