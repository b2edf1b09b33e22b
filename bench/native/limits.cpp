// What this machine can do at most, for bench/limits.py: multiply-adds in registers, and loads. A library of plain C
// functions with nothing of fastrnn in it, so that what is measured is no kernel of ours.
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

// Enough independent sums to hide the latency of an FMA (4 cycles, two a cycle) and of a load.
constexpr int kSums = 12;

template <class V>
[[gnu::always_inline]] inline float total(const V (&sum)[kSums]) {
  float t = 0;
#pragma GCC unroll 32
  for (int s = 0; s < kSums; ++s) t += sum[s][0];
  return t;
}

template <class V>
[[gnu::always_inline]] inline float multiply_add(int64_t rounds) {
  V sum[kSums], a, b;
  for (unsigned i = 0; i < sizeof(V) / sizeof(float); ++i) a[i] = 0.9f + 0.001f * i, b[i] = 0.1f + 0.002f * i;
#pragma GCC unroll 32
  for (int s = 0; s < kSums; ++s) sum[s] = b * static_cast<float>(s);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 32
    for (int s = 0; s < kSums; ++s) sum[s] = sum[s] * a + b;
  }
  return total(sum);
}

template <class V>
[[gnu::always_inline]] inline float load(const float* p, int64_t count) {
  constexpr int64_t kLanes = sizeof(V) / sizeof(float), kStep = kSums * kLanes;
  V sum[kSums];
#pragma GCC unroll 32
  for (int s = 0; s < kSums; ++s) sum[s] = V{};
  for (int64_t i = 0; i + kStep <= count; i += kStep) {
#pragma GCC unroll 32
    for (int s = 0; s < kSums; ++s) {
      V v;
      std::memcpy(&v, p + i + s * kLanes, sizeof v);
      sum[s] += v;
    }
  }
  return total(sum);
}

using Float4 [[gnu::vector_size(16)]] = float;
#if defined(__x86_64__)
using Float8 [[gnu::vector_size(32)]] = float;
using Float16 [[gnu::vector_size(64)]] = float;

[[gnu::target("avx512f,fma,prefer-vector-width=512")]] float multiply_add_avx512(int64_t n) {
  return multiply_add<Float16>(n);
}
[[gnu::target("avx512f,prefer-vector-width=512")]] float load_avx512(const float* p, int64_t n) {
  return load<Float16>(p, n);
}
[[gnu::target("avx2,fma")]] float multiply_add_avx2(int64_t n) { return multiply_add<Float8>(n); }
[[gnu::target("avx2")]] float load_avx2(const float* p, int64_t n) { return load<Float8>(p, n); }
#endif
float multiply_add_default(int64_t n) { return multiply_add<Float4>(n); }
float load_default(const float* p, int64_t n) { return load<Float4>(p, n); }

struct Functions {
  float (*multiply_add)(int64_t);
  float (*load)(const float*, int64_t);
  int64_t lanes;
};

Functions functions(const char* capability) {
#if defined(__x86_64__)
  if (std::strcmp(capability, "avx512") == 0) return {multiply_add_avx512, load_avx512, 16};
  if (std::strcmp(capability, "avx2") == 0) return {multiply_add_avx2, load_avx2, 8};
#endif
  (void)capability;
  return {multiply_add_default, load_default, 4};
}

template <class Work>
void on_threads(int threads, const Work& work) {
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back([&work, t] { work(t); });
  work(0);
  for (std::thread& other : others) other.join();
}

}  // namespace

#define EXPORTED extern "C" [[gnu::visibility("default")]]

// Multiply-adds on every thread; returns the floating-point operations of all of them.
EXPORTED double limits_multiply_add(const char* capability, int threads, int64_t rounds) {
  const Functions f = functions(capability);
  on_threads(threads, [&](int) {
    volatile float kept = f.multiply_add(rounds);
    (void)kept;
  });
  return 2.0 * static_cast<double>(f.lanes) * kSums * static_cast<double>(rounds) * threads;
}

// Reads data [count] `times` times, each thread its own part; returns the bytes read.
EXPORTED double limits_load(const char* capability, int threads, const float* data, int64_t count, int64_t times) {
  const Functions f = functions(capability);
  on_threads(threads, [&](int thread) {
    const int64_t begin = count * thread / threads, end = count * (thread + 1) / threads;
    for (int64_t i = 0; i < times; ++i) {
      volatile float kept = f.load(data + begin, end - begin);
      (void)kept;
    }
  });
  return sizeof(float) * static_cast<double>(count) * static_cast<double>(times);
}
