// Runs a kernel over rows on the OpenMP team that torch already has, so that two thread pools never fight for
// the cores.
#pragma once

#include <cstdint>

namespace rk {

using RangeFn = void (*)(const void* args, int64_t begin, int64_t end);

// Calls fn on disjoint ranges that cover [0, rows), `rows_per_task` rows at a time, on up to `threads`
// threads. Ranges are handed out as threads ask for them; what a row computes never depends on its range.
void parallel_rows(int64_t rows, int64_t rows_per_task, int threads, RangeFn fn, const void* args);

}  // namespace rk
