// rlhf_kernels._native: addresses, sizes and strides in, numbers into the caller's memory. No torch header:
// one build works with every torch version. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdlib>

#include "bind/bind.h"

namespace py = pybind11;

namespace {

// Asks for huge pages under [address, address + bytes), not touched yet. Only a hint:
// refusal costs speed alone.
void advise_huge_pages(uintptr_t address, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t begin = (address + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (address + bytes) & ~(kHuge - 1);
  if (begin < end) madvise(rk::pointer<void>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(address), static_cast<void>(bytes);
#endif
}

// What the files in bind/ add to the module. A function's own variable:
// it exists before their constructors run.
std::vector<void (*)(py::module_&)>& registered() {
  static std::vector<void (*)(py::module_&)> bindings;
  return bindings;
}

}  // namespace

rk::Binding::Binding(void (*add)(py::module_&)) { registered().push_back(add); }

PYBIND11_MODULE(_native, m) {
  const char* forced = std::getenv("RLHF_KERNELS_ISA");
  try {
    rk::set_isa(forced && *forced ? forced : rk::available_isas().at(0));
  } catch (const std::exception& error) {
    throw py::import_error(std::string("RLHF_KERNELS_ISA: ") + error.what());
  }
  m.doc() = "CPU kernels over raw pointers; called by rlhf_kernels.backends.cpu alone.";
  m.def("isa", &rk::isa);
  m.def("available_isas", &rk::available_isas);
  m.def("set_isa", &rk::set_isa, py::arg("name"));
  m.def("has_bfloat_pairs", &rk::has_bfloat_pairs);
  m.def("advise_huge_pages", &advise_huge_pages, rk::NoGil(), py::arg("address"), py::arg("bytes"));
  for (const auto add : registered()) add(m);
}
