#include "isa.h"

#include <stdexcept>

namespace rk {
namespace {

struct Isa {
  std::string name;
  int index;
};

// Best first. libgcc's cpuid code also asks the operating system whether it saves the wide registers.
std::vector<Isa> detect() {
  std::vector<Isa> found;
#ifdef RK_X86_64
  __builtin_cpu_init();
  const auto has = [](int feature) { return feature != 0; };
  const bool v2 = has(__builtin_cpu_supports("sse4.2")) && has(__builtin_cpu_supports("ssse3")) &&
                  has(__builtin_cpu_supports("popcnt"));
  // No CPU has AVX2 and FMA without the rest of v3 (F16C, BMI, LZCNT, MOVBE), nor AVX-512 BW, DQ, VL, CD
  // without F.
  const bool v3 = v2 && has(__builtin_cpu_supports("avx2")) && has(__builtin_cpu_supports("fma")) &&
                  has(__builtin_cpu_supports("bmi2"));
  const bool v4 = v3 && has(__builtin_cpu_supports("avx512f")) && has(__builtin_cpu_supports("avx512bw")) &&
                  has(__builtin_cpu_supports("avx512dq")) && has(__builtin_cpu_supports("avx512vl")) &&
                  has(__builtin_cpu_supports("avx512cd"));
  if (v4) found.push_back({"x86-64-v4", 2});
  if (v3) found.push_back({"x86-64-v3", 1});
  if (v2) found.push_back({"x86-64-v2", 0});
#else
  found.push_back({"baseline", 0});
#endif
  return found;
}

const std::vector<Isa>& isas() {
  static const std::vector<Isa> found = detect();
  return found;
}

const Isa* chosen = nullptr;

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) names.push_back(isa.name);
  return names;
}

const std::string& isa() { return chosen->name; }

int isa_index() { return chosen->index; }

bool has_bfloat_pairs() {
#ifdef RK_AVX512BF16
  return chosen->name == "x86-64-v4" && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

void set_isa(const std::string& name) {
  std::string takes;
  for (const Isa& isa : isas()) {
    if (isa.name == name) {
      chosen = &isa;
      return;
    }
    takes += (takes.empty() ? "" : ", ") + isa.name;
  }
  throw std::invalid_argument("'" + name + "' is not an instruction set of this machine; it has " + takes);
}

}  // namespace rk
