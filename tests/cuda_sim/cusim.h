// The names of csrc/cuda/gpu.h for a C++ compiler: kernels run on the CPU, one fiber per CUDA thread, all fibers of a
// launch on the calling OS thread. Build with -Itests/cuda_sim, and link machine.cpp, memory.cpp and cluster.cpp.
//
// Faults end the launch in a std::runtime_error that names block, thread, file and line. Deterministic; the environment
// variable CUSIM_SEED changes the schedule: an even number shuffles, an odd one lets some threads run ahead of the rest
// as far as barriers allow, and with either asynchronous copies land now early, now late.
//
// Not emulated: speed, weak memory beyond what ThreadSanitizer sees, registers, and the width of lanes in lock-step.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <stdexcept>
#include <tuple>
#include <type_traits>

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ _Pragma("GCC error \"shared memory is declared by SHARED or DYN_SHARED\"")
#define GPU_FN inline

#define threadIdx (::cusim::thread_index())
#define blockIdx (::cusim::block_index())
#define blockDim (::cusim::block_size())
#define gridDim (::cusim::grid_size())

// The tag is the variable's identity: one a place in the source and a template instance.
#define SHARED(T, name, dimensions) \
  static const char name##_tag = 0; \
  auto& name = *static_cast<T(*) dimensions>(::cusim::static_shared(&name##_tag, #name, sizeof(T dimensions)))
#define DYN_SHARED(name) unsigned char* const name = ::cusim::dynamic_shared()

namespace cusim {

using Location = std::source_location;

const uint3& thread_index();
const uint3& block_index();
const dim3& block_size();
const dim3& grid_size();

// Ends the launch. Only from a kernel.
[[noreturn]] void fail(const char* what, Location at);
// Lets the other threads run: in every loop that polls. Fails if it is called very often while nothing else happens.
void yield(const char* what, Location at);
// Something has happened that others may be waiting for.
void progress();

void* static_shared(const void* tag, const char* name, size_t bytes);
unsigned char* dynamic_shared();

// What a lane shows the others in a warp-wide function.
struct Packet {
  uint64_t words[4];
};
// What every lane has shown; valid until the calling lane shows something else.
class Packets {
 public:
  explicit Packets(const Packet* packets) : packets_(packets) {}
  Packet operator[](unsigned lane) const;

 private:
  const Packet* packets_;
};
// Waits until all lanes in mask have shown theirs. Orders no memory.
Packets exchange(unsigned mask, const Packet& mine, const char* what, Location at);
unsigned lane();
// Fails unless lane `from` is one that the calling lane may read after an exchange.
void check_lane(unsigned mask, unsigned from, const char* what, Location at);
// The lanes in mask that exist: a block's last warp may have fewer than 32.
unsigned present(unsigned mask);

// Fails unless [p, p + bytes) lies in the shared memory of the calling block, aligned.
void check_shared(const void* p, size_t bytes, size_t alignment, const char* what, Location at);

void cp_async(void* shared, const void* global, int bytes, int source_bytes, Location at);
void cp_async_wait(size_t pending);
void st_async(uintptr_t to, const void* value, size_t bytes, uintptr_t barrier, Location at);
// The place behind an address of cluster_map, checked.
void* remote(uintptr_t address, size_t bytes, const char* what, Location at);

struct Shape {
  dim3 grid, block;
  size_t shared_bytes;
  unsigned cluster_size;
  bool cooperative;
};
void launch(const void* kernel, const Shape& shape, void (*run_thread)(const void*), const void* arguments);
size_t launches();  // so far
unsigned max_cluster();  // blocks; CUSIM_MAX_CLUSTER lowers it
int max_blocks(dim3 block, size_t shared_bytes);  // at the same time, on a device with H200's shared memory and threads

template <class T>
Packet to_packet(const T& value) {
  static_assert(sizeof(T) <= sizeof(Packet) && std::is_trivially_copyable_v<T>);
  Packet packet{};
  memcpy(&packet, &value, sizeof value);
  return packet;
}
template <class T>
T from_packet(const Packet& packet) {
  T value;
  memcpy(&value, &packet, sizeof value);
  return value;
}

// The value of another lane, or the own one where `from` lies outside the warp's lanes 0 to 31.
template <class T>
T shuffle(unsigned mask, const T& value, int from, const char* what, Location at) {
  const Packets packets = exchange(mask, to_packet(value), what, at);
  if (from < 0 || from > 31) return value;
  check_lane(mask, from, what, at);
  return from_packet<T>(packets[from]);
}

template <class... P, class... A>
void launch_kernel(void (*kernel)(P...), const Shape& shape, const A&... arguments) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
  };
  const Call call{kernel, std::tuple<P...>(static_cast<P>(arguments)...)};
  const auto run_thread = [](const void* p) {
    std::apply(static_cast<const Call*>(p)->kernel, static_cast<const Call*>(p)->arguments);
  };
  launch(reinterpret_cast<const void*>(kernel), shape, run_thread, &call);
}

}  // namespace cusim

namespace gpu {

using bf16 = __nv_bfloat16;
using half = __half;
template <class T>
inline constexpr bool kIs16Bit = std::is_same_v<T, bf16> || std::is_same_v<T, half>;
using cusim::Location;

// --- Launches ---------------------------------------------------------------------------------------------------------

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, const A&... arguments) {
  cusim::launch_kernel(kernel, {grid, block, shared_bytes, 1, false}, arguments...);
}
template <class... P, class... A>
void launch_cooperative(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                        const A&... arguments) {
  cusim::launch_kernel(kernel, {grid, block, shared_bytes, 1, true}, arguments...);
}
template <class... P, class... A>
void launch_cluster(unsigned cluster_size, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
                    cudaStream_t, const A&... arguments) {
  cusim::launch_kernel(kernel, {grid, block, shared_bytes, cluster_size, false}, arguments...);
}
template <class... P>
int max_cooperative_blocks(void (*)(P...), dim3 block, size_t shared_bytes) {
  return cusim::max_blocks(block, shared_bytes);
}
template <class... P>
int max_active_clusters(unsigned cluster_size, void (*)(P...), dim3 block, size_t shared_bytes) {
  if (cluster_size > cusim::max_cluster()) return 0;
  return cusim::max_blocks(block, shared_bytes) / static_cast<int>(cluster_size);
}

// --- Barriers and waiting ---------------------------------------------------------------------------------------------

void syncthreads(Location at = Location::current());
void named_barrier_sync(unsigned id, unsigned threads, Location at = Location::current());
void named_barrier_arrive(unsigned id, unsigned threads, Location at = Location::current());
void syncwarp(unsigned mask = ~0u, Location at = Location::current());
void require_cooperative(Location at = Location::current());
long long clock_cycles();

class Spin {
 public:
  explicit Spin(const char* what, Location at = Location::current()) : what_(what), at_(at) {}
  void operator()() { cusim::yield(what_, at_); }

 private:
  const char* what_;
  Location at_;
};

// --- Warps ------------------------------------------------------------------------------------------------------------

template <class T>
T shuffle(T value, int lane, unsigned mask = ~0u, Location at = Location::current()) {
  return cusim::shuffle(mask, value, lane & 31, "shuffle", at);
}
template <class T>
T shuffle_xor(T value, int lanes, unsigned mask = ~0u, Location at = Location::current()) {
  return cusim::shuffle(mask, value, static_cast<int>(cusim::lane()) ^ lanes, "shuffle_xor", at);
}
template <class T>
T shuffle_up(T value, unsigned lanes, unsigned mask = ~0u, Location at = Location::current()) {
  return cusim::shuffle(mask, value, static_cast<int>(cusim::lane() - lanes), "shuffle_up", at);
}
template <class T>
T shuffle_down(T value, unsigned lanes, unsigned mask = ~0u, Location at = Location::current()) {
  return cusim::shuffle(mask, value, static_cast<int>(cusim::lane() + lanes), "shuffle_down", at);
}
inline unsigned ballot(bool predicate, unsigned mask = ~0u, Location at = Location::current()) {
  const cusim::Packets packets = cusim::exchange(mask, cusim::to_packet(predicate), "ballot", at);
  unsigned result = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (cusim::present(mask) >> lane & 1 && cusim::from_packet<bool>(packets[lane])) result |= 1u << lane;
  }
  return result;
}

// --- Memory. The atomics are compiled with the kernel, so that ThreadSanitizer sees them and their order. --------------

template <class T>
T load_readonly(const T* p) {
  return *p;
}
template <class T>
T load_l2(const T* p) {
  return *p;
}
inline void prefetch_l2(const void*) {}

inline unsigned load_acquire_gpu(const unsigned* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
inline unsigned load_relaxed_gpu(const unsigned* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
inline uint64_t load_relaxed_gpu(const uint64_t* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
inline void store_release_gpu(unsigned* p, unsigned value) {
  cusim::progress();
  __atomic_store_n(p, value, __ATOMIC_RELEASE);
}
inline void store_relaxed_gpu(unsigned* p, unsigned value) {
  cusim::progress();
  __atomic_store_n(p, value, __ATOMIC_RELAXED);
}
inline void store_relaxed_gpu(uint64_t* p, uint64_t value) {
  cusim::progress();
  __atomic_store_n(p, value, __ATOMIC_RELAXED);
}
inline void add_release_gpu(unsigned* p, unsigned value) {
  cusim::progress();
  __atomic_fetch_add(p, value, __ATOMIC_RELEASE);
}
inline void add_relaxed_gpu(unsigned* p, unsigned value) {
  cusim::progress();
  __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}
inline uint4 load_relaxed_gpu(const uint4* p) {
  const auto* words = reinterpret_cast<const unsigned*>(p);
  return {load_relaxed_gpu(words), load_relaxed_gpu(words + 1), load_relaxed_gpu(words + 2),
          load_relaxed_gpu(words + 3)};
}
inline void fence_gpu() {}  // fibers see each other's stores in order, and ThreadSanitizer knows no fences
inline unsigned load_acquire_cluster(const unsigned* p) { return load_acquire_gpu(p); }
inline void store_release_cluster(unsigned* p, unsigned value) { store_release_gpu(p, value); }
inline void add_release_cluster(unsigned* p, unsigned value) { add_release_gpu(p, value); }

template <int kBytes>
void cp_async(void* shared, const void* global, int source_bytes = kBytes, Location at = Location::current()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  cusim::cp_async(shared, global, kBytes, source_bytes, at);
}
void cp_async_commit();
template <int kPending>
void cp_async_wait() {
  cusim::cp_async_wait(kPending);
}

// --- Matrices ---------------------------------------------------------------------------------------------------------

template <int kCount>
void ldmatrix(uint32_t (&r)[kCount], const void* row, Location at = Location::current()) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  cusim::check_shared(row, 16, 16, "ldmatrix", at);
  const cusim::Packets rows = cusim::exchange(~0u, cusim::to_packet(row), "ldmatrix", at);
  const unsigned g = cusim::lane() / 4, t = cusim::lane() % 4;
  for (int i = 0; i < kCount; ++i) {
    memcpy(&r[i], cusim::from_packet<const char*>(rows[8 * i + g]) + 4 * t, 4);
  }
}
template <int kCount>
void ldmatrix_transposed(uint32_t (&r)[kCount], const void* row, Location at = Location::current()) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  cusim::check_shared(row, 16, 16, "ldmatrix_transposed", at);
  const cusim::Packets rows = cusim::exchange(~0u, cusim::to_packet(row), "ldmatrix_transposed", at);
  const unsigned g = cusim::lane() / 4, t = cusim::lane() % 4;
  for (int i = 0; i < kCount; ++i) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) memcpy(&pair[j], cusim::from_packet<const char*>(rows[8 * i + 2 * t + j]) + 2 * g, 2);
    memcpy(&r[i], pair, 4);
  }
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Location at = Location::current()) {
  static_assert(kIs16Bit<T>);
  struct Fragments {
    T a[4][2], b[2][2];
  } mine;
  memcpy(mine.a, a, sizeof a);
  memcpy(mine.b, b, sizeof b);
  const cusim::Packets packets = cusim::exchange(~0u, cusim::to_packet(mine), "mma_m16n8k16", at);
  const unsigned g = cusim::lane() / 4, t = cusim::lane() % 4;
  for (int q = 0; q < 4;
       ++q) {  // lanes 4 g + q hold columns 2 q, 2 q + 1, 2 q + 8 and 2 q + 9 of rows g and g + 8 of a
    const Fragments of_row = cusim::from_packet<Fragments>(packets[4 * g + q]);
    for (int column = 0; column < 2; ++column) {
      const Fragments of_column = cusim::from_packet<Fragments>(packets[4 * (2 * t + column) + q]);
      for (int k = 0; k < 4; ++k) {
        const float y = static_cast<float>(of_column.b[k / 2][k % 2]);
        d[column] += static_cast<float>(of_row.a[k / 2 * 2][k % 2]) * y;
        d[2 + column] += static_cast<float>(of_row.a[k / 2 * 2 + 1][k % 2]) * y;
      }
    }
  }
}

inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }
inline float tanh_approx(float x) {  // to 11 bits, as the hardware's error may be
  uint32_t bits;
  const float y = std::tanh(x);
  memcpy(&bits, &y, sizeof bits);
  constexpr uint32_t kDropped = (1u << 13) - 1;
  if (!std::isnan(y)) bits = (bits + kDropped / 2) & ~kDropped;
  float rounded;
  memcpy(&rounded, &bits, sizeof rounded);
  return rounded;
}

// --- Clusters ---------------------------------------------------------------------------------------------------------

unsigned cluster_rank();
unsigned cluster_size();
void cluster_arrive(Location at = Location::current());
void cluster_arrive_relaxed(Location at = Location::current());
void cluster_wait(Location at = Location::current());

struct ClusterAddress {
  uintptr_t value;
  ClusterAddress operator+(int bytes) const { return {value + bytes}; }
};
ClusterAddress cluster_map(const void* own, unsigned rank, Location at = Location::current());
inline void remote_store(ClusterAddress to, uint32_t value, Location at = Location::current()) {
  *static_cast<uint32_t*>(cusim::remote(to.value, sizeof value, "remote_store", at)) = value;
}
inline void remote_store(ClusterAddress to, uint4 value, Location at = Location::current()) {
  *static_cast<uint4*>(cusim::remote(to.value, sizeof value, "remote_store", at)) = value;
}
inline uint32_t remote_load(ClusterAddress from, Location at = Location::current()) {
  return *static_cast<uint32_t*>(cusim::remote(from.value, sizeof(uint32_t), "remote_load", at));
}

void mbarrier_init(uint64_t* barrier, unsigned arrivals, Location at = Location::current());
void mbarrier_arrive(uint64_t* barrier, Location at = Location::current());
void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes, Location at = Location::current());
void mbarrier_arrive_remote(ClusterAddress barrier, Location at = Location::current());
bool mbarrier_try_wait(uint64_t* barrier, unsigned parity, Location at = Location::current());
inline bool mbarrier_try_wait_block(uint64_t* barrier, unsigned parity, Location at = Location::current()) {
  return mbarrier_try_wait(barrier, parity, at);
}
template <class T>
void st_async(ClusterAddress to, T value, ClusterAddress barrier, Location at = Location::current()) {
  static_assert(std::is_same_v<T, uint32_t> || std::is_same_v<T, uint2> || std::is_same_v<T, uint4>);
  cusim::st_async(to.value, &value, sizeof value, barrier.value, at);
}
void bulk_load(void* shared, const void* global, unsigned bytes, uint64_t* barrier, Location at = Location::current());

}  // namespace gpu
