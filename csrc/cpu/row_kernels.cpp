// The row kernels for any processor, and the choice among the instruction sets that were compiled.
#include "row_kernels.h"

#include <cmath>
#include <cstdint>
#include <limits>

#include "isa.h"

#define DML_ISA baseline
#include "row_kernels_impl.h"

namespace dml::cpu {

template <class A>
const RowKernels<A>& row_kernels() {
#if defined(__x86_64__)
  if (chosen_isa() == Isa::avx512) return avx512::table<A>();
  if (chosen_isa() == Isa::avx2) return avx2::table<A>();
#endif
  return baseline::table<A>();
}

template const RowKernels<float>& row_kernels<float>();
template const RowKernels<double>& row_kernels<double>();

}  // namespace dml::cpu
