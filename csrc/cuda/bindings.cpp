// rlhf_kernels._cuda: the CUDA C++ kernels over device addresses and a stream. No torch header; the CUDA
// runtime is linked statically and looks for the driver at the first launch, so importing needs no GPU.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "scan.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void gae(uintptr_t rewards, uintptr_t values, int dtype, uintptr_t mask, uintptr_t bootstrap,
         uintptr_t offsets, int offset_bytes, int64_t rows, int64_t time, int64_t stride_rewards,
         int64_t stride_values, int64_t stride_mask, double gamma, double lam, int holes,
         uintptr_t advantages, uintptr_t returns, uintptr_t stream) {
  const rk::cuda::Gae args = {pointer<void>(rewards),
                              pointer<void>(values),
                              pointer<uint8_t>(mask),
                              pointer<float>(bootstrap),
                              pointer<void>(offsets),
                              offset_bytes,
                              pointer<float>(advantages),
                              pointer<float>(returns),
                              stride_rewards,
                              stride_values,
                              stride_mask,
                              rows,
                              time,
                              static_cast<float>(gamma),
                              static_cast<float>(gamma * lam)};
  const char* error = rk::cuda::gae(args, static_cast<rk::cuda::Dtype>(dtype),
                                    static_cast<rk::cuda::Holes>(holes), pointer<void>(stream));
  if (error) throw std::runtime_error(std::string("gae: the CUDA kernel was not launched: ") + error);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels over device addresses; called by rlhf_kernels.backends.cuda alone.";
  m.def("gae", &gae);
}
