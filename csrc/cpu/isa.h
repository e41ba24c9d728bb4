// Which instruction set's copy of the kernels runs: chosen once at import from cpuid, or by RLHF_KERNELS_ISA.
#pragma once

#include <string>
#include <vector>

namespace rk {

// Names that this machine can run, best first.
std::vector<std::string> available_isas();

const std::string& isa();

// Throws std::invalid_argument for a name that is unknown or that this machine cannot run.
void set_isa(const std::string& name);

// Its place among those that this build has, narrowest first: x86_64_v2, v3, v4, or baseline alone.
int isa_index();

// Whether the chosen instruction set's CPU multiplies pairs of bfloat16 (AVX512_BF16).
bool has_bfloat_pairs();

}  // namespace rk
