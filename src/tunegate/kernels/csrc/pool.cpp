#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tunegate {
namespace {

constexpr int kSpins = 4000;  // some 20-100 us of pause instructions, then sleep
constexpr int kMostThreads = 256;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Pool {
  std::mutex mutex;
  std::condition_variable wake, left;
  std::atomic<uint64_t> epoch{0};  // counts jobs; a worker sleeps until it moves
  std::atomic<int> active{0};      // workers inside the open job; changed under mutex
  int sleeping = 0, invited = 0;   // under mutex; workers above `invited` sit the job out
  bool open = false, caller_sleeps = false;
  Task task = nullptr;
  void* context = nullptr;
  int64_t tasks = 0;
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;  // the first that a task threw; under mutex
  std::vector<std::thread> workers;
};

Pool* pool = nullptr;  // leaked on purpose: workers may outlive static destructors
std::mutex caller_mutex;
thread_local int wanted = 1;  // as torch counts its threads: for each that calls
thread_local int my_index = 0;
thread_local bool inside = false;

// A task may throw, for want of memory: the others are then dropped and the caller rethrows when all threads are out.
void take_tasks(Pool& own) {
  try {
    for (int64_t i; (i = own.next.fetch_add(1, std::memory_order_relaxed)) < own.tasks;) own.task(own.context, i);
  } catch (...) {
    own.next.store(own.tasks, std::memory_order_relaxed);
    std::lock_guard<std::mutex> lock(own.mutex);
    if (!own.failure) own.failure = std::current_exception();
  }
}

// A worker that wakes too late finds the job closed: the caller never waits for a thread that has not begun.
void work(Pool* own, int index) {
  my_index = index;
  inside = true;
  uint64_t seen = 0;
  for (;;) {
    for (int spin = 0; spin < kSpins && own->epoch.load(std::memory_order_acquire) == seen; spin++) pause();
    std::unique_lock<std::mutex> lock(own->mutex);
    own->sleeping++;
    own->wake.wait(lock, [&] { return own->epoch.load(std::memory_order_relaxed) != seen; });
    own->sleeping--;
    seen = own->epoch.load(std::memory_order_relaxed);
    if (!own->open || index > own->invited) continue;
    own->active.fetch_add(1, std::memory_order_relaxed);
    lock.unlock();
    take_tasks(*own);
    lock.lock();
    if (own->active.fetch_sub(1, std::memory_order_release) == 1 && own->caller_sleeps) own->left.notify_one();
  }
}

void forget_after_fork() {
  pool = nullptr;  // the child has none of the threads; the old pool's memory is left alone
  new (&caller_mutex) std::mutex;
  inside = false;
  my_index = 0;
}

// At load, not with the pool: a fork during the first job must find it.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, forget_after_fork);

Pool& ready_pool(int workers) {
  if (!pool) pool = new Pool;
  while (int(pool->workers.size()) < workers)
    pool->workers.emplace_back(work, pool, int(pool->workers.size()) + 1);
  return *pool;
}

struct Buffer {
  void* data[4] = {};
  int64_t size[4] = {};
  ~Buffer() {
    for (void* p : data) std::free(p);
  }
};
thread_local Buffer buffers;

}  // namespace

void set_threads(int count) { wanted = std::min(std::max(count, 1), kMostThreads); }
int threads() { return wanted; }
int worker_index() { return my_index; }

void* scratch(int64_t bytes, int slot) {
  if (buffers.size[slot] < bytes) {
    std::free(buffers.data[slot]);
    int64_t rounded = (bytes + 4095) / 4096 * 4096;
    buffers.data[slot] = std::aligned_alloc(64, size_t(rounded));
    buffers.size[slot] = buffers.data[slot] ? rounded : 0;
    if (!buffers.data[slot]) throw std::bad_alloc();
  }
  return buffers.data[slot];
}

void run_parallel(int64_t tasks, Task task, void* context) {
  int workers = int(std::min<int64_t>(threads(), tasks)) - 1;
  if (workers <= 0 || inside) {
    for (int64_t i = 0; i < tasks; i++) task(context, i);
    return;
  }
  std::lock_guard<std::mutex> one_caller(caller_mutex);
  Pool& own = ready_pool(workers);
  bool anyone_sleeps;
  {
    std::lock_guard<std::mutex> lock(own.mutex);
    own.task = task;
    own.context = context;
    own.tasks = tasks;
    own.next.store(0, std::memory_order_relaxed);
    own.invited = workers;
    own.open = true;
    own.epoch.fetch_add(1, std::memory_order_release);
    anyone_sleeps = own.sleeping > 0;
  }
  if (anyone_sleeps) own.wake.notify_all();
  inside = true;
  take_tasks(own);
  inside = false;
  std::unique_lock<std::mutex> lock(own.mutex);
  own.open = false;
  if (own.active.load(std::memory_order_relaxed)) {
    lock.unlock();
    for (int spin = 0; spin < kSpins && own.active.load(std::memory_order_acquire); spin++) pause();
    lock.lock();
    own.caller_sleeps = true;
    own.left.wait(lock, [&] { return own.active.load(std::memory_order_relaxed) == 0; });
    own.caller_sleeps = false;
  }
  if (own.failure) std::rethrow_exception(std::exchange(own.failure, nullptr));
}

}  // namespace tunegate
