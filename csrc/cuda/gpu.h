// Everything that is CUDA's and not C++'s: instructions, barriers, shared memory, launches. Kernels are written on these
// names alone, so that the same source also runs on the CPU, one fiber per CUDA thread (tests/cuda_sim/). PTX, asm and
// launch syntax stand nowhere else.
//
// What a kernel must keep to in order to run in both worlds:
// - shared memory by SHARED(T, name, [N]) and DYN_SHARED(name); launches by gpu::launch and its sisters;
// - flags between blocks only through the acquire, release and relaxed functions; every loop that polls has a gpu::Spin;
// - no return before a barrier or a warp-wide function that the rest of the warp, block, grid or cluster still reaches;
// - every branch of an `if constexpr` in braces: nvcc 13.0 dropped unbraced ones inside lambdas, silently.
#pragma once

#ifndef __CUDACC__

#include "cusim.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cxxabi.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

// A static array in shared memory, and the dynamic shared memory of the launch as bytes (one name for all kernels of a
// file, since C++ sees one array).
#define SHARED(T, name, dimensions) __shared__ T name dimensions
#define DYN_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

#define GPU_FN __device__ __forceinline__

// Instructions of sm_90 and later. For older devices kernels that have them compile too, and must not be launched.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define GPU_ASM_SM90(...) __trap()
#else
#define GPU_ASM_SM90(...) asm volatile(__VA_ARGS__)
#endif

// What assert() calls in a kernel; unlike printf it needs no stack.
extern "C" __host__ __device__ void __assertfail(const char* assertion, const char* file, unsigned line,
                                                 const char* function, size_t char_size) noexcept;

namespace gpu {

using bf16 = __nv_bfloat16;
using half = __half;
template <class T>
inline constexpr bool kIs16Bit = std::is_same_v<T, bf16> || std::is_same_v<T, half>;

// --- Launches: throw std::runtime_error, with the kernel's name. No synchronisation: may be captured in a graph. -------

inline std::string kernel_name(const void* kernel) {
  const char* mangled = nullptr;
  if (cudaFuncGetName(&mangled, kernel) != cudaSuccess || mangled == nullptr) return "(unknown)";
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> name(abi::__cxa_demangle(mangled, nullptr, nullptr, &status), std::free);
  return status == 0 ? name.get() : mangled;
}

inline void check(cudaError_t error, const void* kernel) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // a later call of someone else must not find it
  throw std::runtime_error("CUDA kernel " + kernel_name(kernel) + ": " + cudaGetErrorString(error));
}

// Lets a kernel have so much dynamic shared memory on the current device. What it may have never shrinks: of two threads
// that launch one kernel with different sizes, each would else take from the other what it has just asked for.
inline void allow_shared(const void* kernel, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  int device = 0;
  check(cudaGetDevice(&device), kernel);
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& most = allowed[{kernel, device}];
  if (bytes <= most) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), kernel);
  most = bytes;
}

// How a kernel is launched; its attributes are set where the defaults do not do.
class Launch {
 public:
  Launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, bool cooperative,
         unsigned cluster_size) {
    constexpr size_t kSharedByDefault = 16 << 10;  // 48 KiB, less what static arrays may take of it
    constexpr unsigned kPortableCluster = 8;
    if (shared_bytes > kSharedByDefault) allow_shared(kernel, shared_bytes);
    if (cluster_size > kPortableCluster) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), kernel);
    }
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes_;
    if (cooperative) {
      attributes_[config.numAttrs].id = cudaLaunchAttributeCooperative;
      attributes_[config.numAttrs++].val.cooperative = 1;
    }
    if (cluster_size > 1) {
      attributes_[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes_[config.numAttrs++].val.clusterDim = {cluster_size, 1, 1};
    }
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  cudaLaunchConfig_t config{};

 private:
  cudaLaunchAttribute attributes_[2];
};

template <class... P>
const void* address(void (*kernel)(P...)) {
  return reinterpret_cast<const void*>(kernel);
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            const A&... arguments) {
  const Launch how(address(kernel), grid, block, shared_bytes, stream, false, 1);
  check(cudaLaunchKernelEx(&how.config, kernel, static_cast<P>(arguments)...), address(kernel));
}

// All blocks run at the same time, or the launch fails: for grid_barrier.
template <class... P, class... A>
void launch_cooperative(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                        const A&... arguments) {
  const Launch how(address(kernel), grid, block, shared_bytes, stream, true, 1);
  check(cudaLaunchKernelEx(&how.config, kernel, static_cast<P>(arguments)...), address(kernel));
}

// Clusters of cluster_size blocks that are neighbours in x; more than 8 where the device allows it.
template <class... P, class... A>
void launch_cluster(unsigned cluster_size, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
                    cudaStream_t stream, const A&... arguments) {
  const Launch how(address(kernel), grid, block, shared_bytes, stream, false, cluster_size);
  check(cudaLaunchKernelEx(&how.config, kernel, static_cast<P>(arguments)...), address(kernel));
}

// The largest grid that launch_cooperative accepts on the current device.
template <class... P>
int max_cooperative_blocks(void (*kernel)(P...), dim3 block, size_t shared_bytes) {
  const Launch how(address(kernel), dim3(1), block, shared_bytes, nullptr, true, 1);
  int device = 0, multiprocessors = 0, blocks = 0;
  check(cudaGetDevice(&device), address(kernel));
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), address(kernel));
  const int threads = static_cast<int>(block.x * block.y * block.z);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes), address(kernel));
  return blocks * multiprocessors;
}

// How many such clusters the current device runs at the same time: 0 where one does not fit.
template <class... P>
int max_active_clusters(unsigned cluster_size, void (*kernel)(P...), dim3 block, size_t shared_bytes) {
  const Launch how(address(kernel), dim3(cluster_size), block, shared_bytes, nullptr, false, cluster_size);
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &how.config), address(kernel));
  return clusters;
}

// --- Barriers and waiting ---------------------------------------------------------------------------------------------

GPU_FN void syncthreads() { __syncthreads(); }

// A barrier of `threads` threads, in whole warps, of the block. id: 1 to 15; 0 is syncthreads.
GPU_FN void named_barrier_sync(unsigned id, unsigned threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Counts as arrived and goes on: for the side that only produces.
GPU_FN void named_barrier_arrive(unsigned id, unsigned threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

GPU_FN void syncwarp(unsigned mask = ~0u) { __syncwarp(mask); }

GPU_FN long long clock_cycles() { return clock64(); }

// Bounds a loop that polls: `Spin spin("what"); while (!there()) spin();`. After some 20 seconds the kernel dies of an
// assertion, which names the block and the thread, in place of a hang that nobody can look into.
class Spin {
 public:
  GPU_FN explicit Spin(const char* what) : what_(what) { start_ = clock64(); }
  GPU_FN void operator()() {
    if (clock64() - start_ <= kLimit) return;
    __assertfail(what_, __FILE__, __LINE__, "waits too long", 1);
    __trap();
  }

 private:
  static constexpr long long kLimit = 1ll << 35;
  const char* what_;
  long long start_;
};

GPU_FN void require_cooperative() {}  // the launch itself has seen to it

// --- Warps ------------------------------------------------------------------------------------------------------------

// The lane's value, of all lanes in mask; shuffles order no memory.
template <class T>
GPU_FN T shuffle(T value, int lane, unsigned mask = ~0u) {
  return __shfl_sync(mask, value, lane);
}
template <class T>
GPU_FN T shuffle_xor(T value, int lanes, unsigned mask = ~0u) {
  return __shfl_xor_sync(mask, value, lanes);
}
template <class T>
GPU_FN T shuffle_up(T value, unsigned lanes, unsigned mask = ~0u) {
  return __shfl_up_sync(mask, value, lanes);
}
template <class T>
GPU_FN T shuffle_down(T value, unsigned lanes, unsigned mask = ~0u) {
  return __shfl_down_sync(mask, value, lanes);
}
GPU_FN unsigned ballot(bool predicate, unsigned mask = ~0u) { return __ballot_sync(mask, predicate); }

// --- Memory -----------------------------------------------------------------------------------------------------------

GPU_FN uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// For data that no one writes while the kernel runs.
template <class T>
GPU_FN T load_readonly(const T* p) {
  return __ldg(p);
}
// Past L1, which does not see what other blocks write.
template <class T>
GPU_FN T load_l2(const T* p) {
  return __ldcg(p);
}
GPU_FN void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Words that threads of different blocks share. Scope gpu: any block of the grid; cluster: of the own cluster. What was
// written before a release is seen after the acquire that reads its value; relaxed accesses order nothing else.
GPU_FN unsigned load_acquire_gpu(const unsigned* p) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
GPU_FN void store_release_gpu(unsigned* p, unsigned value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
GPU_FN void add_release_gpu(unsigned* p, unsigned value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
GPU_FN unsigned load_relaxed_gpu(const unsigned* p) {
  unsigned value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
GPU_FN void store_relaxed_gpu(unsigned* p, unsigned value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
GPU_FN void add_relaxed_gpu(unsigned* p, unsigned value) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
// 8 bytes at once: data that carries its own flag.
GPU_FN uint64_t load_relaxed_gpu(const uint64_t* p) {
  uint64_t value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
  return value;
}
GPU_FN void store_relaxed_gpu(uint64_t* p, uint64_t value) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
}
// 16 bytes, of which each word by itself is as above.
GPU_FN uint4 load_relaxed_gpu(const uint4* p) {
  uint4 value;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(p)
               : "memory");
  return value;
}
// What the thread has read and written comes before what it will.
GPU_FN void fence_gpu() { __threadfence(); }
GPU_FN unsigned load_acquire_cluster(const unsigned* p) {
  unsigned value = 0;
  GPU_ASM_SM90("ld.acquire.cluster.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
GPU_FN void store_release_cluster(unsigned* p, unsigned value) {
  GPU_ASM_SM90("st.release.cluster.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
GPU_FN void add_release_cluster(unsigned* p, unsigned value) {
  GPU_ASM_SM90("red.release.cluster.add.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

// Copies to shared memory that go on in the background: what was committed as a group has landed when the issuing
// thread has waited until at most kPending younger groups are left (and other threads see it after a barrier).
// kBytes: 4, 8 or 16, and both addresses are multiples of it; what lies beyond source_bytes becomes zero.
template <int kBytes>
GPU_FN void cp_async(void* shared, const void* global, int source_bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(kBytes), "r"(source_bytes)
                 : "memory");
  }
}
GPU_FN void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
GPU_FN void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// --- Matrices ---------------------------------------------------------------------------------------------------------

// kCount matrices of 8 rows of 8 16-bit numbers: lane i gives the address of row i % 8 of matrix i / 8 (16 bytes, aligned
// to 16; lanes beyond 8 * kCount repeat a valid one). Lane i gets columns i % 4 * 2 and the next of row i / 4 of each.
template <int kCount>
GPU_FN void ldmatrix(uint32_t (&r)[kCount], const void* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  const uint32_t from = shared_address(row);
  if constexpr (kCount == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(from) : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  }
}
// The same, transposed: lane i gets rows i % 4 * 2 and the next of column i / 4.
template <int kCount>
GPU_FN void ldmatrix_transposed(uint32_t (&r)[kCount], const void* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  const uint32_t from = shared_address(row);
  if constexpr (kCount == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(from) : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  }
}

// d [16, 8] += a [16, 16] b [16, 8], T (bf16 or half) in, float32 out; the whole warp. With g = lane / 4, t = lane % 4:
// a: (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..); b: (2t.., g), (2t + 8.., g), two numbers a register, the
// first in the low half; d: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <class T>
GPU_FN void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(kIs16Bit<T>);
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// --- Approximations (relative error about 2^-22, of tanh 2^-11) ---------------------------------------------------------

GPU_FN float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
GPU_FN float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
GPU_FN float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// --- Clusters (sm_90) -------------------------------------------------------------------------------------------------

GPU_FN unsigned cluster_rank() {
  unsigned value = 0;
  GPU_ASM_SM90("mov.u32 %0, %%cluster_ctarank;" : "=r"(value));
  return value;
}
GPU_FN unsigned cluster_size() {
  unsigned value = 1;
  GPU_ASM_SM90("mov.u32 %0, %%cluster_nctarank;" : "=r"(value));
  return value;
}

// Every thread of every block arrives, then waits. An arrival releases and a wait acquires, remote shared memory too. The
// relaxed arrival, for "I have read" rather than "I have written", spares the wait for earlier stores.
GPU_FN void cluster_arrive() { GPU_ASM_SM90("barrier.cluster.arrive.release.aligned;" :: : "memory"); }
GPU_FN void cluster_arrive_relaxed() { GPU_ASM_SM90("barrier.cluster.arrive.relaxed.aligned;" :: : "memory"); }
GPU_FN void cluster_wait() { GPU_ASM_SM90("barrier.cluster.wait.acquire.aligned;" :: : "memory"); }

// An address in the shared memory of some block of the cluster. Valid between a first cluster barrier, after which that
// block surely runs, and a last one, before which it does not exit.
struct ClusterAddress {
  uint32_t value;
  GPU_FN ClusterAddress operator+(int bytes) const { return {value + bytes}; }
};
// The place of `own`, of this block's shared memory, in block `rank`.
GPU_FN ClusterAddress cluster_map(const void* own, unsigned rank) {
  ClusterAddress mapped{0};
  GPU_ASM_SM90("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped.value) : "r"(shared_address(own)), "r"(rank));
  return mapped;
}
GPU_FN void remote_store(ClusterAddress to, uint32_t value) {
  GPU_ASM_SM90("st.shared::cluster.u32 [%0], %1;" ::"r"(to.value), "r"(value) : "memory");
}
GPU_FN void remote_store(ClusterAddress to, uint4 value) {
  GPU_ASM_SM90("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to.value), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w) : "memory");
}
GPU_FN uint32_t remote_load(ClusterAddress from) {
  uint32_t value = 0;
  GPU_ASM_SM90("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(from.value) : "memory");
  return value;
}

// --- mbarriers (sm_90): 8 bytes of shared memory that count arrivals and bytes, phase after phase ------------------------

// By one thread; a barrier of the block (of the cluster, if others use it) comes before any other use.
GPU_FN void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
  GPU_ASM_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
  GPU_ASM_SM90("fence.mbarrier_init.release.cluster;" :: : "memory");
}
GPU_FN void mbarrier_arrive(uint64_t* barrier) {
  GPU_ASM_SM90("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and the phase also waits for so many bytes of st_async and bulk_load.
GPU_FN void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes) {
  GPU_ASM_SM90("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes) : "memory");
}
GPU_FN void mbarrier_arrive_remote(ClusterAddress barrier) {
  GPU_ASM_SM90("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier.value) : "memory");
}
// Whether the phase of that parity (0 for the first) has completed; may take a while to say no. Acquires what threads of
// the cluster released, or of the own block only.
GPU_FN bool mbarrier_try_wait(uint64_t* barrier, unsigned parity) {
  uint32_t done = 0;
  GPU_ASM_SM90(
      "{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done;
}
GPU_FN bool mbarrier_try_wait_block(uint64_t* barrier, unsigned parity) {
  uint32_t done = 0;
  GPU_ASM_SM90(
      "{.reg .pred p; mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}" : "=r"(
          done) : "r"(shared_address(barrier)),
      "r"(parity) : "memory");
  return done;
}

// Stores to a block of the cluster, and counts its bytes on an mbarrier of that block.
GPU_FN void st_async(ClusterAddress to, uint32_t value, ClusterAddress barrier) {
  GPU_ASM_SM90("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(to.value),
               "r"(value), "r"(barrier.value) : "memory");
}
GPU_FN void st_async(ClusterAddress to, uint2 value, ClusterAddress barrier) {
  GPU_ASM_SM90(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.u32 [%0], {%1, %2}, [%3];" ::"r"(to.value),
      "r"(value.x), "r"(value.y), "r"(barrier.value) : "memory");
}
GPU_FN void st_async(ClusterAddress to, uint4 value, ClusterAddress barrier) {
  GPU_ASM_SM90(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to.value),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(barrier.value) : "memory");
}
// Copies global to own shared memory and counts its bytes on an own mbarrier: one thread for any size. All in multiples
// of 16 bytes.
GPU_FN void bulk_load(void* shared, const void* global, unsigned bytes, uint64_t* barrier) {
  GPU_ASM_SM90("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}

}  // namespace gpu

#undef GPU_ASM_SM90

#endif  // __CUDACC__

// --- Made of the above: written once for both worlds ------------------------------------------------------------------

namespace gpu {

GPU_FN float to_float(float x) { return x; }
GPU_FN float to_float(bf16 x) { return __bfloat162float(x); }
GPU_FN float to_float(half x) { return __half2float(x); }

// Rounds to nearest even.
template <class T>
GPU_FN T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, half>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

// Two 16-bit numbers as a register of mma_m16n8k16 has them: the first in the low half.
template <class T>
GPU_FN uint32_t pack(float low, float high) {
  static_assert(kIs16Bit<T>);
  uint32_t word;
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&word, &pair, sizeof word);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&word, &pair, sizeof word);
  }
  return word;
}
template <class T>
GPU_FN float2 unpack(uint32_t word) {
  static_assert(kIs16Bit<T>);
  T pair[2];
  memcpy(static_cast<void*>(pair), &word, sizeof word);
  return make_float2(to_float(pair[0]), to_float(pair[1]));
}

// In a fixed order, the same in every lane.
GPU_FN float warp_sum(float value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += shuffle_xor(value, lanes);
  return value;
}
GPU_FN float warp_max(float value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value = fmaxf(value, shuffle_xor(value, lanes));
  return value;
}

// All threads of all blocks of a cooperative launch (of one-dimensional blocks). The counter starts at zero and never
// goes back: target is the number of blocks times how often the barrier was passed, this time included.
GPU_FN void grid_barrier(unsigned* counter, unsigned target) {
  require_cooperative();
  syncthreads();
  if (threadIdx.x == 0) {
    add_release_gpu(counter, 1);
    Spin spin("grid_barrier");
    while (load_acquire_gpu(counter) < target) spin();
  }
  syncthreads();
}

GPU_FN void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Until the phase of that parity has completed. The clock is read only where the first try, which waits a while, fails.
GPU_FN void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  if (mbarrier_try_wait(barrier, parity)) return;
  Spin spin("mbarrier_wait");
  while (!mbarrier_try_wait(barrier, parity)) spin();
}
// For what has come to the own block's shared memory: by bulk_load, st_async, or from threads of the block that called
// mbarrier_arrive. It drops nothing from L1, which mbarrier_wait does for what other blocks wrote to global memory.
GPU_FN void mbarrier_wait_block(uint64_t* barrier, unsigned parity) {
  if (mbarrier_try_wait_block(barrier, parity)) return;
  Spin spin("mbarrier_wait_block");
  while (!mbarrier_try_wait_block(barrier, parity)) spin();
}

}  // namespace gpu
