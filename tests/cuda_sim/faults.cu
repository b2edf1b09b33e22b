// Small kernels that break one rule each, by the entry's name; "none" of each breaks none. For the emulator only.
#include "program.h"

namespace {

enum Fault {
  kNone,
  kDivergence,
  kTwoBarriers,
  kEarlyReturn,
  kLaneOutsideMask,
  kNoBarrier,
  kNoWarpBarrier,
  kDynamicOutOfBounds,
  kBeforeDynamic,
  kStaticOutOfBounds,
  kReadOutOfBounds,
  kCopyOutOfBounds,
  kCopyNotWaited,
  kNotCooperative,
  kBlockSkips,
  kRelaxedFlag,
  kRank,
  kAddress,
  kBeforeFirstBarrier,
  kExitBeforeAccess,
  kArriveTwice,
  kWaitWithoutArrive,
  kExitBetween,
  kStoreNotWaited,
  kNotInitialised,
  kTooManyArrivals,
  kNeverSatisfied,
};

}  // namespace

// out [64] = x [64] reversed, by way of shared memory; blocks of 64 threads.
__global__ void block_rules(const float* x, float* out, int fault) {
  SHARED(float, table, [64]);
  DYN_SHARED(bytes);
  float* const values = reinterpret_cast<float*>(bytes);
  const int i = threadIdx.x, shift = fault == kDynamicOutOfBounds ? 1 : fault == kBeforeDynamic ? -1 : 0;
  if (fault == kCopyOutOfBounds || fault == kCopyNotWaited) {
    gpu::cp_async<4>(values + i + (fault == kCopyOutOfBounds), x + i);
    gpu::cp_async_commit();
  }
  values[i + shift] = x[i];
  if (fault == kEarlyReturn && i == 40) return;
  if (fault == kLaneOutsideMask) gpu::shuffle(i, 20, 0xFFFF0FFFu);
  if (fault == kNoWarpBarrier) {
    out[i] = values[i ^ 1];
    return;
  }
  if (fault == kDivergence) {
    if (i < 40) gpu::syncthreads();
    gpu::syncwarp();
  } else if (fault == kTwoBarriers) {
    if (i < 32) {
      gpu::syncthreads();
    } else {
      gpu::syncthreads();
    }
  } else if (fault != kNoBarrier) {
    gpu::syncthreads();
  }
  table[fault == kStaticOutOfBounds && i == 63 ? 64 : i] = values[63 - i + (fault == kReadOutOfBounds)];
  if (fault == kEarlyReturn) gpu::warp_sum(0.f);
  gpu::syncthreads();
  out[i] = table[i];
}

// Blocks hand x on to the next one.
__global__ void grid_rules(const float* x, float* between, float* out, unsigned* counter, int fault) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
  between[i] = x[i];
  if (fault == kBlockSkips && blockIdx.x == 1) return;
  if (fault == kRelaxedFlag) {
    gpu::syncthreads();
    if (threadIdx.x == 0) {
      gpu::add_relaxed_gpu(counter, 1);
      gpu::Spin spin("relaxed flag");
      while (gpu::load_acquire_gpu(counter) < gridDim.x) spin();
    }
    gpu::syncthreads();
  } else {
    gpu::grid_barrier(counter, gridDim.x);
  }
  out[i] = between[(i + blockDim.x) % n];
}

// out [blocks, 64]: the rank of the left neighbour, written by it.
__global__ void cluster_rules(uint32_t* out, int fault) {
  DYN_SHARED(bytes);
  uint32_t* const own = reinterpret_cast<uint32_t*>(bytes) + threadIdx.x;
  uint64_t* const counter = reinterpret_cast<uint64_t*>(bytes + 256);
  const unsigned rank = gpu::cluster_rank(), size = gpu::cluster_size();
  if (threadIdx.x == 0 && fault != kNotInitialised) gpu::mbarrier_init(counter, 1);
  if (fault != kBeforeFirstBarrier) gpu::cluster_sync();
  const unsigned right = fault == kRank ? size : (rank + 1) % size;
  const gpu::ClusterAddress to = gpu::cluster_map(own, right) + (fault == kAddress ? 4096 : 0);
  if (fault == kStoreNotWaited) {
    gpu::st_async(to, rank, gpu::cluster_map(counter, right));
  } else {
    gpu::remote_store(to, rank);
  }
  if (fault == kArriveTwice) gpu::cluster_arrive();
  if (fault == kWaitWithoutArrive) gpu::cluster_wait();
  if (fault == kExitBetween) {
    gpu::cluster_arrive();
    return;
  }
  if (fault != kExitBeforeAccess) gpu::cluster_sync();
  if (fault == kTooManyArrivals) {
    gpu::mbarrier_arrive_expect(counter, 16);
    gpu::mbarrier_arrive_expect(counter, 16);
  }
  if (fault == kNotInitialised || fault == kNeverSatisfied) gpu::mbarrier_wait(counter, 0);
  out[blockIdx.x * 64 + threadIdx.x] = *own;
}

namespace {

void run_block_rules(const program::Case& c, Fault fault) {
  gpu::launch(block_rules, dim3(1), dim3(64), 64 * sizeof(float), nullptr, c.array<float>("x"), c.array<float>("out"),
              fault);
}
void run_grid_rules(const program::Case& c, Fault fault) {
  const auto launch = [&](auto how) {
    how(grid_rules, dim3(4), dim3(64), size_t{0}, cudaStream_t{}, c.array<float>("x"), c.array<float>("between"),
        c.array<float>("out"), c.array<unsigned>("counter"), fault);
  };
  if (fault == kNotCooperative) {
    launch([](auto... arguments) { gpu::launch(arguments...); });
  } else {
    launch([](auto... arguments) { gpu::launch_cooperative(arguments...); });
  }
}
void run_cluster_rules(const program::Case& c, Fault fault) {
  gpu::launch_cluster(4, cluster_rules, dim3(4), dim3(64), 512, nullptr, c.array<uint32_t>("out"), fault);
}

}  // namespace

int main(int argc, char** argv) {
  program::Entries entries;
  const auto add = [&](auto run, std::initializer_list<std::pair<const char*, Fault>> faults) {
    for (const auto& [name, fault] : faults) {
      entries[name] = [run, fault = fault](const program::Case& c) { run(c, fault); };
    }
  };
  add(run_block_rules, {{"block_none", kNone},
                        {"divergence", kDivergence},
                        {"two_barriers", kTwoBarriers},
                        {"early_return", kEarlyReturn},
                        {"lane_outside_mask", kLaneOutsideMask},
                        {"no_barrier", kNoBarrier},
                        {"no_warp_barrier", kNoWarpBarrier},
                        {"dynamic_out_of_bounds", kDynamicOutOfBounds},
                        {"before_dynamic", kBeforeDynamic},
                        {"static_out_of_bounds", kStaticOutOfBounds},
                        {"read_out_of_bounds", kReadOutOfBounds},
                        {"copy_out_of_bounds", kCopyOutOfBounds},
                        {"copy_not_waited", kCopyNotWaited}});
  add(run_grid_rules, {{"grid_none", kNone},
                       {"not_cooperative", kNotCooperative},
                       {"block_skips", kBlockSkips},
                       {"relaxed_flag", kRelaxedFlag}});
  add(run_cluster_rules, {{"cluster_none", kNone},
                          {"rank", kRank},
                          {"address", kAddress},
                          {"before_first_barrier", kBeforeFirstBarrier},
                          {"exit_before_access", kExitBeforeAccess},
                          {"arrive_twice", kArriveTwice},
                          {"wait_without_arrive", kWaitWithoutArrive},
                          {"exit_between", kExitBetween},
                          {"store_not_waited", kStoreNotWaited},
                          {"not_initialised", kNotInitialised},
                          {"too_many_arrivals", kTooManyArrivals},
                          {"never_satisfied", kNeverSatisfied}});
  return program::run(argc, argv, entries);
}
