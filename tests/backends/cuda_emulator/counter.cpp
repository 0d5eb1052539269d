// An op in addition to the emulated ones: returns how many kernels the emulator has launched.
#include <torch/csrc/stable/library.h>

#include "emulator.h"

namespace {
std::int64_t launches() { return emulator::machine().launches; }
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dml_kernels_cuda_emulated, m) { m.def("launches() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(dml_kernels_cuda_emulated, CompositeExplicitAutograd, m) {
  m.impl("launches", TORCH_BOX(&launches));
}
