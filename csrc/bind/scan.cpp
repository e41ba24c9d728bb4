#include "bind.h"

namespace rk {
namespace {

void run_gae(uintptr_t rewards, uintptr_t values, int dtype, uintptr_t mask, uintptr_t bootstrap,
             int64_t batch, int64_t time, int64_t stride_rewards, int64_t stride_values, int64_t stride_mask,
             double gamma, double lam, int holes, uintptr_t advantages, uintptr_t returns, int threads) {
  Gae args = {pointer<void>(rewards),
              pointer<void>(values),
              pointer<uint8_t>(mask),
              pointer<float>(bootstrap),
              pointer<float>(advantages),
              pointer<float>(returns),
              stride_rewards,
              stride_values,
              stride_mask,
              batch,
              time,
              static_cast<Dtype>(dtype),
              static_cast<Holes>(holes),
              static_cast<float>(gamma),
              static_cast<float>(lam)};
  // A multiple of the widest vector, one lane per row.
  const int64_t chunk = (rows_per_task(batch, time, threads) + 15) / 16 * 16;
  run<&Kernels::gae>(args, batch, chunk, threads);
}

}  // namespace

void bind_scan(py::module_& m) { m.def("gae", &run_gae, NoGil()); }

}  // namespace rk
