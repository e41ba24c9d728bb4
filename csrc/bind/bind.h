// Shared by the bindings: a function of the module, its kernels' table,
// and a kernel run over rows on torch's threads.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/isa.h"
#include "../cpu/parallel.h"

namespace rk {

namespace py = pybind11;
using NoGil = py::call_guard<py::gil_scoped_release>;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A task has at least so many elements: 5 us of arithmetic, a few times what it takes to wake a thread.
constexpr int64_t kMinElementsPerTask = 32768;

// Elements of a large task: several huge pages, so that two threads rarely fault in, and zero, the same one.
constexpr int64_t kLargeTask = int64_t{1} << 20;

// Rows handed to a thread at a time: four tasks a thread where they are large enough, so that no thread waits
// long for another one whose rows the mask leaves out less often.
inline int64_t rows_per_task(int64_t rows, int64_t elements_per_row, int threads) {
  const int64_t width = std::max<int64_t>(1, elements_per_row);
  const int64_t balanced = std::min(kLargeTask / width, rows / (4 * int64_t{std::max(1, threads)}));
  return std::max({int64_t{1}, kMinElementsPerTask / width, balanced});
}

// Runs a kernel over rows [0, rows), `rows_per_task` rows at a time.
template <class Args>
void parallel_for_rows(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t rows,
                       int64_t rows_per_task, int threads) {
  struct Call {
    void (*kernel)(const Args&, int64_t, int64_t);
    const Args& args;
  };
  const Call call = {kernel, args};
  parallel_rows(
      rows, rows_per_task, threads,
      [](const void* p, int64_t begin, int64_t end) {
        const Call& call = *static_cast<const Call*>(p);
        call.kernel(call.args, begin, end);
      },
      &call);
}

// How Python calls a function of the module. Two addresses in the wrong order corrupt memory, so keywords are
// the rule; where a call is so short that they cost 2 to 6 % of it, tests/test_native_calls.py holds the name
// of each argument against its position.
enum class Passing { kKeywords, kPositions };

// "int64_t rows, int threads" -> rows, threads.
inline std::vector<std::string> parameter_names(const std::string& parameters) {
  std::vector<std::string> names;
  for (size_t begin = 0; begin < parameters.size();) {
    const size_t end = std::min(parameters.find(',', begin), parameters.size());
    const size_t name = parameters.rfind(' ', end) + 1;
    names.push_back(parameters.substr(name, end - name));
    begin = end + 1;
  }
  return names;
}

template <class Function, size_t... I>
void define(py::module_& m, const char* name, Function* function, const std::vector<std::string>& names,
            Passing passing, std::index_sequence<I...>) {
  if (passing == Passing::kKeywords)
    m.def(name, function, NoGil(), py::kw_only(), py::arg(names[I].c_str())...);
  else
    m.def(name, function, NoGil(), py::arg(names[I].c_str())..., py::pos_only());
}

template <class Result, class... Parameters>
void define(py::module_& m, const char* name, Result (*function)(Parameters...), const char* parameters,
            Passing passing) {
  define(m, name, function, parameter_names(parameters), passing,
         std::make_index_sequence<sizeof...(Parameters)>());
}

// One function that the module gets at import; to create one is to register it.
struct Binding {
  explicit Binding(void (*add)(py::module_&));
};

// The head of a function of the module: Python knows the parameters by the names that stand here.
#define RK_FUNCTION(PASSING, RESULT, NAME, ...)                                                         \
  RESULT NAME(__VA_ARGS__);                                                                             \
  const Binding NAME##_binding([](py::module_& m) { define(m, #NAME, &NAME, #__VA_ARGS__, PASSING); }); \
  RESULT NAME(__VA_ARGS__)
#define RK_KEYWORDS(RESULT, NAME, ...) RK_FUNCTION(Passing::kKeywords, RESULT, NAME, __VA_ARGS__)
#define RK_POSITIONS(RESULT, NAME, ...) RK_FUNCTION(Passing::kPositions, RESULT, NAME, __VA_ARGS__)

}  // namespace rk

#define RK_DECLARE(NAME, ARGS) void NAME(const ARGS&, int64_t begin, int64_t end);
#define RK_MEMBER(NAME, ARGS) void (*NAME)(const ARGS&, int64_t begin, int64_t end);
#define RK_NAME(NAME, ARGS) NAME,
#ifdef RK_X86_64
#define RK_EACH_ISA(DO, KERNELS) DO(x86_64_v2, KERNELS) DO(x86_64_v3, KERNELS) DO(x86_64_v4, KERNELS)
#else
#define RK_EACH_ISA(DO, KERNELS) DO(baseline, KERNELS)
#endif
#define RK_TABLE_OF_ISA(ISA, KERNELS)            \
  namespace ISA {                                \
  KERNELS(RK_DECLARE)                            \
  namespace {                                    \
  constexpr Kernels kTable = {KERNELS(RK_NAME)}; \
  }                                              \
  }

#define RK_TABLE_ADDRESS(ISA, KERNELS) &ISA::kTable,

// A family's kernels(), the table of the chosen instruction set's copies. KERNELS: the macro in its header.
// Plain data on purpose: code that ran at import from a kernel's own object could use an instruction that
// this machine lacks.
#define RK_KERNEL_TABLE(KERNELS)                                                          \
  namespace rk {                                                                          \
  namespace {                                                                             \
  struct Kernels {                                                                        \
    KERNELS(RK_MEMBER)                                                                    \
  };                                                                                      \
  }                                                                                       \
  RK_EACH_ISA(RK_TABLE_OF_ISA, KERNELS)                                                   \
  namespace {                                                                             \
  const Kernels& kernels() {                                                              \
    static constexpr const Kernels* kTables[] = {RK_EACH_ISA(RK_TABLE_ADDRESS, KERNELS)}; \
    return *kTables[isa_index()];                                                         \
  }                                                                                       \
  }                                                                                       \
  }
