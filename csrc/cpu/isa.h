// The instruction set that the kernels use on this processor, and the source of their matrix products.
#pragma once

namespace dml::cpu {

enum class Isa { baseline, avx2, avx512 };

// Chosen once: the best that the processor has, or less if DML_CPU_ISA=default|avx2|avx512 asks for less.
Isa chosen_isa();

const char* isa();             // "default", "avx2" or "avx512"
const char* product_source();  // a sentence for `python -m dml_kernels info`

}  // namespace dml::cpu
