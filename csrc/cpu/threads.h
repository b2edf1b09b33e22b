// One parallel region for a whole scan: a team whose members really run at the same time, and their barrier.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

#include "cpu/denormals.h"

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace fastrnn {

inline void pause_cpu() {
#if defined(__SSE__)
  _mm_pause();
#endif
}

// Spins, then yields: with more threads than cores, the one that is waited for may need this core.
template <class Condition>
void spin_until(const Condition& condition) {
  for (int i = 0; i < 4096; ++i) {
    if (condition()) return;
    pause_cpu();
  }
  while (!condition()) std::this_thread::yield();
}

class alignas(128) Barrier {
 public:
  void wait(int members) {
    if (members == 1) return;
    const int phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == members - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
    } else {
      spin_until([&] { return phase_.load(std::memory_order_acquire) != phase; });
    }
  }

 private:
  std::atomic<int> arrived_{0};
  alignas(128) std::atomic<int> phase_{0};
};

// How many steps a scan has left behind it, for one that reads what they leave.
class alignas(128) Progress {
 public:
  void reach(int64_t steps) { steps_.store(steps, std::memory_order_release); }
  void wait_for(int64_t steps) const {
    spin_until([&] { return steps_.load(std::memory_order_acquire) >= steps; });
  }

 private:
  std::atomic<int64_t> steps_{0};
};

// Calls body(member, members) once per member. Members may wait for each other, so they must run at the same time, and
// at::parallel_for does not promise that: it may hand several ranges to one thread. So the ranges gather first, and those
// that came are the team. Under OpenMP every range has begun once one has; a thread pool may run them one after the
// other: if some are missing after a while, the first to notice runs body(0, 1) alone.
template <class Body>
void run_team(int threads, const Body& body) {
  if (threads <= 1 || at::in_parallel_region()) {
    const FlushDenormals guard;
    body(0, 1);
    return;
  }
  enum Verdict { kOpen, kTogether, kAlone };
  std::atomic<int> arrived{0}, covered{0}, verdict{kOpen};
  std::atomic<bool> claimed{false};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const int order = arrived.fetch_add(1);
    const int span = static_cast<int>(end - begin);
    int expected = kOpen;
    if (covered.fetch_add(span) + span == threads) {
      verdict.compare_exchange_strong(expected, kTogether);
    } else {
#if AT_PARALLEL_OPENMP
      const auto late = [] { return false; };
#else
      const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(50);
      const auto late = [&] { return std::chrono::steady_clock::now() > deadline; };
#endif
      spin_until([&] { return verdict.load() != kOpen || late(); });
      verdict.compare_exchange_strong(expected, kAlone);
    }
    const FlushDenormals guard;
    if (verdict.load() == kTogether) {
      const int members = arrived.load();
      // the same thread gets the same share in every call, while its cache may still hold something of it
      body(members == threads ? static_cast<int>(begin) : order, members);
    } else if (!claimed.exchange(true)) {
      body(0, 1);
    }
  });
}

}  // namespace fastrnn
