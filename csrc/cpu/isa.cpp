#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace dml::cpu {
namespace {

Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

Isa choose() {
  const char* asked = std::getenv("DML_CPU_ISA");
  if (!asked) return best();
  const Isa cap = !std::strcmp(asked, "default") ? Isa::baseline
                  : !std::strcmp(asked, "avx2")  ? Isa::avx2
                                                 : Isa::avx512;
  return std::min(best(), cap);
}

}  // namespace

Isa chosen_isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa() {
  constexpr const char* names[] = {"default", "avx2", "avx512"};
  return names[static_cast<int>(chosen_isa())];
}

const char* products() {
  return "PyTorch's own CPU matrix product (MKL, oneDNN, OpenBLAS or whatever that build of torch has), "
         "one tile at a time through the stable ABI; no BLAS is linked here";
}

}  // namespace dml::cpu
