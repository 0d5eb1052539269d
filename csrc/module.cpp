// The pybind11 module dml_kernels._C: what was built, with what, and what runs here. Importing it runs the static
// initialisers of the other files of the same library, and so registers the ops. It includes no torch header, so that
// build information is there with any version of PyTorch.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "cpu/isa.h"

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("gcc ") + __VERSION__;
#else
  return "unknown";
#endif
}

const char* machine() {
#if defined(__x86_64__)
  return "x86_64";
#elif defined(__aarch64__)
  return "aarch64";
#else
  return "other";
#endif
}

py::list instruction_sets() {
  py::list names;
  names.append("default");
#if defined(__x86_64__)
  names.append("avx2");
  names.append("avx512");
#endif
  return names;
}

py::object text_or_none(const char* text) { return *text ? py::object(py::str(text)) : py::object(py::none()); }

py::dict build_info() {
  constexpr std::uint64_t target = TORCH_TARGET_VERSION;
  py::dict info;
  info["compiler"] = compiler();
  info["flags"] = DML_BUILD_FLAGS;
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["machine"] = machine();
  info["isas"] = instruction_sets();
  info["cuda"] = text_or_none(DML_BUILD_CUDA);
  info["why_no_cuda"] = text_or_none(DML_BUILD_NO_CUDA);
  info["sanitizers"] = text_or_none(DML_BUILD_SANITIZERS);
  info["torch_version"] = DML_BUILD_TORCH;
  info["torch_target"] = std::to_string(target >> 56) + "." + std::to_string((target >> 48) & 0xff);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of dml_kernels; importing this module registers the compiled ops.";
  m.def("build_info", &build_info,
        "Compiler, flags, C++ standard, CUDA architectures, sanitizers and torch built with.");
  m.def("cpu_capability", &dml::cpu::isa, "The instruction set chosen for this processor: avx512, avx2 or default.");
  m.def("cpu_products", &dml::cpu::product_source, "Where the matrix products of the CPU kernels come from.");
}
