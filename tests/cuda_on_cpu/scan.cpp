// The scan kernel of csrc/cuda, block by block on the CPU; called through ctypes by tests/test_cuda.py.
#include "../../csrc/cuda/scan.cuh"

namespace {

using namespace rk::cuda;

constexpr int kThreads = 64;  // two warps: enough to carry from one to the other

template <class T, Holes kHoles>
void run(const Gae& args, unsigned first) {
  for (int64_t row = 0; row < args.rows; ++row)
    emulated::run_block(static_cast<unsigned>(row), kThreads, first, [&] {
      if (args.mask)
        gae_kernel<T, kHoles, true, kThreads>(args);
      else
        gae_kernel<T, Holes::kSkip, false, kThreads>(args);
    });
}

template <class T>
void run_holes(const Gae& args, int holes, unsigned first) {
  if (holes == 0) run<T, Holes::kSkip>(args, first);
  if (holes == 1) run<T, Holes::kStop>(args, first);
  if (holes == 2) run<T, Holes::kZero>(args, first);
}

}  // namespace

extern "C" void gae(const void* rewards, const void* values, int dtype, const uint8_t* mask,
                    const float* bootstrap, const void* offsets, int offset_bytes, int64_t rows, int64_t time,
                    int64_t stride_rewards, int64_t stride_values, int64_t stride_mask, double gamma,
                    double lam, int holes, float* advantages, float* returns, unsigned first_thread) {
  const Gae args = {rewards,
                    values,
                    mask,
                    bootstrap,
                    offsets,
                    offset_bytes,
                    advantages,
                    returns,
                    stride_rewards,
                    stride_values,
                    stride_mask,
                    rows,
                    time,
                    static_cast<float>(gamma),
                    static_cast<float>(gamma * lam)};
  if (dtype == 0) run_holes<float>(args, holes, first_thread);
  if (dtype == 1) run_holes<__half>(args, holes, first_thread);
  if (dtype == 2) run_holes<__nv_bfloat16>(args, holes, first_thread);
}
