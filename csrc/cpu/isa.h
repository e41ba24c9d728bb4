// Which instruction set's copy of the kernels runs: chosen once at import from cpuid, or by RLHF_KERNELS_ISA.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace rk {

// Names that this machine can run, best first.
std::vector<std::string> available_isas();

const std::string& isa();

// Throws std::invalid_argument for a name that is unknown or that this machine cannot run.
void set_isa(const std::string& name);

const Kernels& kernels();

}  // namespace rk
