// The row kernels for processors with AVX2.
#if defined(__x86_64__)
#include <cmath>
#include <cstdint>
#include <limits>

#include "row_kernels.h"

// After the headers, so that none of their inline functions is compiled for this instruction set and then called on
// processors without it.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif
#define DML_ISA avx2
#include "row_kernels_impl.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
