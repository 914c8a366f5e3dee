// Includes host.h: the kept threads of the host twin.
//
// Threads start with the first work, never at import. A child of fork() has none of its parent's
// threads: it forgets the pool, locks included, and starts its own when it has work.
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "host.h"

namespace efficientad {
namespace {

class Pool {
 public:
  explicit Pool(int size) {
    workers_.reserve(size);
    try {
      for (int i = 1; i < size; ++i) workers_.emplace_back([this] { serve(); });  // one is the caller
    } catch (const std::system_error&) {
      // The process may have no more threads: those that started, or the caller alone, do the work.
    }
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  void run(int64_t count, const std::function<void(int64_t)>& body, int limit) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn || workers_.empty() || count < 2 || limit == 1) {
      for (int64_t i = 0; i < count; ++i) body(i);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      body_ = &body;
      limit_ = limit;
      count_ = count;
      next_ = 0;
      error_ = nullptr;
      ++round_;
    }
    wake_.notify_all();
    work(body);
    std::unique_lock<std::mutex> lock(mutex_);
    body_ = nullptr;  // a thread that wakes up late finds nothing
    idle_.wait(lock, [this] { return active_ == 0; });
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void work(const std::function<void(int64_t)>& body) {
    try {
      for (int64_t i = next_++; i < count_; i = next_++) body(i);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      error_ = std::current_exception();
      next_ = count_;
    }
  }

  void serve() {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stopping_ || round_ != seen; });
      if (stopping_) return;
      seen = round_;
      if (body_ == nullptr || (limit_ > 0 && active_ >= limit_ - 1)) continue;
      const auto& body = *body_;
      ++active_;
      lock.unlock();
      work(body);
      lock.lock();
      if (--active_ == 0) idle_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, idle_;
  const std::function<void(int64_t)>* body_ = nullptr;
  std::atomic<int64_t> next_{0};
  int64_t count_ = 0;
  int active_ = 0, limit_ = 0;
  uint64_t round_ = 0;
  bool stopping_ = false;
  std::exception_ptr error_;
  std::vector<std::thread> workers_;
};

// Kept behind a pointer that is never freed: no destructor waits for threads at exit, and a child
// process can drop what it must not touch.
struct State {
  std::mutex mutex;
  std::shared_ptr<Pool> pool;
  int size = 0;
};

State* state = new State;

void forget() {
  State* fresh = new State;
  fresh->size = state->size;
  state = fresh;
}

const int registered = pthread_atfork(nullptr, nullptr, forget);

int automatic() {
  return std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, 16);
}

}  // namespace

void parallel(int64_t count, const std::function<void(int64_t)>& body, int limit) {
  std::shared_ptr<Pool> pool;
  {
    std::lock_guard<std::mutex> lock(state->mutex);
    if (!state->pool) state->pool = std::make_shared<Pool>(threads());
    pool = state->pool;
  }
  pool->run(count, body, limit);
}

int threads() { return state->size > 0 ? state->size : automatic(); }

void set_threads(int count) {
  if (count < 0) throw std::invalid_argument("threads must be 0 (automatic) or more");
  std::shared_ptr<Pool> old;  // ends here, outside the lock, or with the last caller that uses it
  std::lock_guard<std::mutex> lock(state->mutex);
  state->size = count;
  old.swap(state->pool);
}

}  // namespace efficientad
