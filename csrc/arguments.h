// Checks of the registered ops' arguments that do not depend on where the tensors are.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>

namespace dml {

// The number of one of `count` choices (a metric, a policy, a reduction) as its enumerator.
template <class Choice>
Choice choice(std::int64_t code, std::int64_t count, const char* name) {
  STD_TORCH_CHECK(code >= 0 && code < count, "dml_kernels: ", name, " must be a code from 0 to ", count - 1, "; got ",
                  code);
  return Choice(code);
}

inline bool has_shape(const torch::stable::Tensor& t, std::initializer_list<std::int64_t> shape) {
  if (t.dim() != std::int64_t(shape.size())) return false;
  std::int64_t dimension = 0;
  for (const std::int64_t size : shape)
    if (t.size(dimension++) != size) return false;
  return true;
}

}  // namespace dml
