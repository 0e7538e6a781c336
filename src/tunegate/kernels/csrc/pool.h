// Threads for the kernels: the caller and up to threads() - 1 workers take tasks 0..n-1 from one counter.
//
// Which thread runs a task is not fixed, so a task's result must not depend on it; the kernels' sums are split by
// data, never by thread, and give the same bytes on any number of threads. A waiting thread spins for some
// microseconds and then sleeps: a busy neighbour on its core costs a wake-up, not the core.
#pragma once
#include <cstdint>

namespace tunegate {

void set_threads(int count);  // of the calling thread's next parallel() on; at least 1
int threads();

using Task = void (*)(void* context, int64_t index);
void run_parallel(int64_t tasks, Task task, void* context);  // inline if tasks == 1, threads() == 1 or nested
int worker_index();                                           // 0 for the caller, 1.. for workers; < 256
void* scratch(int64_t bytes, int slot);  // this thread's own buffer, 64-byte aligned, kept for its next use; slot < 4

template <typename F>
inline void parallel(int64_t tasks, F&& body) {
  run_parallel(tasks, [](void* context, int64_t index) { (*static_cast<F*>(context))(index); }, &body);
}

}  // namespace tunegate
