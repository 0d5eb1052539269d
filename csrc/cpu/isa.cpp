#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace dml::cpu {
namespace {

const char* name_of(Isa isa) {
  constexpr const char* names[] = {"default", "avx2", "avx512"};
  return names[static_cast<int>(isa)];
}

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
  if (!asked || !*asked) return best();
  for (const Isa cap : {Isa::baseline, Isa::avx2, Isa::avx512})
    if (!std::strcmp(asked, name_of(cap))) return std::min(best(), cap);
  throw std::invalid_argument(std::string("DML_CPU_ISA must be default, avx2 or avx512; got '") + asked + "'");
}

}  // namespace

Isa chosen_isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa() { return name_of(chosen_isa()); }

const char* product_source() {
  return "PyTorch's own CPU matrix product (MKL, oneDNN, OpenBLAS or whatever that build of torch has), "
         "one tile at a time through the stable ABI; no BLAS is linked here";
}

}  // namespace dml::cpu
