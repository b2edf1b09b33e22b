// Every function of gpu.h in a small kernel; tests/test_cuda_sim.py knows what must come out.
#include "program.h"

using gpu::bf16;
using gpu::half;

__global__ void shuffles(const float* x, float* out) {  // x [32], out [6, 32]
  const int lane = threadIdx.x;
  const float v = x[lane];
  out[lane] = gpu::shuffle(v, (lane + 5) % 32);
  out[32 + lane] = gpu::shuffle_xor(v, 3);
  out[64 + lane] = gpu::shuffle_up(v, 2);
  out[96 + lane] = gpu::shuffle_down(v, 4);
  out[128 + lane] = gpu::warp_sum(v);
  out[160 + lane] = gpu::warp_max(v);
}

__global__ void half_warps(const float* x, float* out, unsigned* votes) {  // each half on its own
  const int lane = threadIdx.x;
  const unsigned mask = lane < 16 ? 0xFFFFu : 0xFFFF0000u;
  out[lane] = gpu::shuffle_xor(x[lane], 8, mask);
  votes[lane] = gpu::ballot(x[lane] > 0, mask);
}

__global__ void static_shared(const int* x, int* out) {  // x [4, 32], out transposed
  SHARED(int, tile, [4][32]);
  SHARED(int, offset, [1]);
  const int row = threadIdx.y, column = threadIdx.x;
  tile[row][column] = x[row * 32 + column];
  if (row == 0 && column == 0) offset[0] = static_cast<int>(blockIdx.x) * 1000;
  gpu::syncthreads();
  out[blockIdx.x * 128 + column * 4 + row] = tile[row][column] + offset[0];
}

__global__ void warp_exchange(const int* x, int* out) {
  DYN_SHARED(bytes);
  int* values = reinterpret_cast<int*>(bytes);
  values[threadIdx.x] = x[threadIdx.x];
  gpu::syncwarp();
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

// Warp 0 fills, warp 1 takes; they never meet in a barrier of the whole block.
__global__ void named_barriers(const int* x, int* out, int rounds) {
  SHARED(int, slot, [32]);
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < rounds; ++i) {
    if (threadIdx.x < 32) {
      if (i > 0) gpu::named_barrier_sync(2, 64);  // the slot is empty
      slot[lane] = x[i * 32 + lane];
      gpu::named_barrier_arrive(1, 64);  // and full
    } else {
      gpu::named_barrier_sync(1, 64);
      out[i * 32 + 31 - lane] = slot[lane];
      if (i + 1 < rounds) gpu::named_barrier_arrive(2, 64);
    }
  }
}

// Two groups, each waited for on its own; of the last 16 bytes only 6 are there.
template <int kBytes>
__global__ void copies(const unsigned char* x, unsigned char* out) {
  DYN_SHARED(bytes);
  unsigned char* first = bytes + threadIdx.x * kBytes;
  unsigned char* second = first + 32 * kBytes;
  gpu::cp_async<kBytes>(first, x + threadIdx.x * kBytes);
  gpu::cp_async_commit();
  gpu::cp_async<kBytes>(second, x + (32 + threadIdx.x) * kBytes, threadIdx.x == 31 ? 3 : kBytes);
  gpu::cp_async_commit();
  gpu::cp_async_wait<1>();
  for (int i = 0; i < kBytes; ++i) out[threadIdx.x * kBytes + i] = first[i];
  gpu::cp_async_wait<0>();
  gpu::syncthreads();
  const unsigned char* other = bytes + (32 + (threadIdx.x ^ 1)) * kBytes;
  for (int i = 0; i < kBytes; ++i) out[(32 + threadIdx.x) * kBytes + i] = other[i];
}

// x [32, 8]: four matrices. out [7, 32, 4] words: x1, x2, x4, and the same transposed.
template <int kCount>
GPU_FN void store_matrices(const uint16_t* tile, uint32_t* out, int lane) {
  uint32_t plain[kCount], transposed[kCount];
  gpu::ldmatrix<kCount>(plain, tile + lane % (8 * kCount) * 8);
  gpu::ldmatrix_transposed<kCount>(transposed, tile + lane % (8 * kCount) * 8);
  for (int i = 0; i < kCount; ++i) {
    out[lane * kCount + i] = plain[i];
    out[(32 + lane) * kCount + i] = transposed[i];
  }
}
__global__ void matrices(const uint16_t* x, uint32_t* x1, uint32_t* x2, uint32_t* x4) {
  DYN_SHARED(bytes);
  uint16_t* tile = reinterpret_cast<uint16_t*>(bytes);
  const int lane = threadIdx.x;
  for (int i = 0; i < 8; ++i) tile[lane * 8 + i] = x[lane * 8 + i];
  gpu::syncthreads();
  store_matrices<1>(tile, x1, lane);
  store_matrices<2>(tile, x2, lane);
  store_matrices<4>(tile, x4, lane);
}

template <class T>
__global__ void multiply(const uint32_t* a, const uint32_t* b, const float* c,
                         float* d) {  // a [16, 16], b [8, 16], c, d
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const uint32_t fragment_a[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]};
  const uint32_t fragment_b[2] = {b[g * 8 + t], b[g * 8 + t + 4]};
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  gpu::mma_m16n8k16<T>(sum, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

template <class T>
__global__ void conversions(const float* x, T* single, uint32_t* pairs, float* back) {  // x [64]
  const int i = threadIdx.x;
  single[2 * i] = gpu::from_float<T>(x[2 * i]);
  single[2 * i + 1] = gpu::from_float<T>(x[2 * i + 1]);
  pairs[i] = gpu::pack<T>(x[2 * i], x[2 * i + 1]);
  const float2 unpacked = gpu::unpack<T>(pairs[i]);
  back[2 * i] = unpacked.x;
  back[2 * i + 1] = unpacked.y;
}

__global__ void approximations(const float* x, float* out) {  // x [32], out [3, 32]
  const int i = threadIdx.x;
  out[i] = gpu::exp2_approx(x[i]);
  out[32 + i] = gpu::reciprocal_approx(x[i]);
  out[64 + i] = gpu::tanh_approx(x[i]);
}

__global__ void loads(const float* x, float* out, int* later) {
  const int i = threadIdx.x;
  const long long start = gpu::clock_cycles();
  gpu::prefetch_l2(x + i);
  out[i] = gpu::load_readonly(x + i) + gpu::load_l2(x + 31 - i);
  later[i] = gpu::clock_cycles() > start;
}

// Block 0 hands x to block 1: by a flag that is stored, by a counter, and by words that are their own flag.
__global__ void flags(const int* x, int* between, unsigned* words, uint64_t* carriers, int* out) {
  const int i = threadIdx.x;
  if (blockIdx.x == 0) {
    between[i] = x[i];
    gpu::syncthreads();
    if (i == 0) gpu::store_release_gpu(words, 1);
    between[32 + i] = 2 * x[i];
    gpu::add_release_gpu(words + 1, 1);
    gpu::store_relaxed_gpu(carriers + i, uint64_t{1} << 32 | static_cast<unsigned>(x[i]));
    gpu::add_relaxed_gpu(words + 2, 1);
    if (i == 0) gpu::store_relaxed_gpu(words + 3, 7u);
  } else {
    gpu::Spin spin("flags");
    while (gpu::load_acquire_gpu(words) != 1) spin();
    out[i] = between[31 - i];
    while (gpu::load_acquire_gpu(words + 1) != 32) spin();
    out[32 + i] = between[32 + 31 - i];
    uint64_t carrier;
    while ((carrier = gpu::load_relaxed_gpu(carriers + 31 - i)) >> 32 == 0) spin();
    out[64 + i] = static_cast<int>(carrier);
    while (gpu::load_relaxed_gpu(words + 2) != 32 || gpu::load_relaxed_gpu(words + 3) != 7) spin();
    gpu::fence_gpu();
    const uint4 all = gpu::load_relaxed_gpu(reinterpret_cast<const uint4*>(words));
    if (all.x != 1 || all.y != 32 || all.z != 32 || all.w != 7) out[64 + i] = -1;
  }
}

__global__ void grid_barriers(int* a, int* b, unsigned* counter, int rounds) {  // rotates by a block, `rounds` times
  const int n = gridDim.x * blockDim.x, i = blockIdx.x * blockDim.x + threadIdx.x;
  for (int round = 0; round < rounds; ++round) {
    b[i] = gpu::load_l2(a + (i + blockDim.x) % n);
    gpu::grid_barrier(counter, gridDim.x * (2 * round + 1));
    a[i] = gpu::load_l2(b + i);
    gpu::grid_barrier(counter, gridDim.x * (2 * round + 2));
  }
}

// Every block gets the numbers of its right neighbour by loads, and gives its own to the left one by stores.
__global__ void cluster_memory(const uint32_t* x, uint32_t* out) {  // x [blocks, 32]; out [blocks, 3, 32]
  SHARED(uint32_t, own, [32]);
  SHARED(uint32_t, given, [32]);
  SHARED(uint4, given4, [8]);
  const int i = threadIdx.x;
  const unsigned rank = gpu::cluster_rank(), size = gpu::cluster_size(), right = (rank + 1) % size;
  own[i] = x[blockIdx.x * 32 + i];
  given[i] = 0;
  if (i < 8) given4[i] = make_uint4(0, 0, 0, 0);
  gpu::cluster_sync();
  out[blockIdx.x * 96 + i] = gpu::remote_load(gpu::cluster_map(own, right) + 4 * i);
  gpu::remote_store(gpu::cluster_map(&given[31 - i], right), own[i]);
  if (i < 8) gpu::remote_store(gpu::cluster_map(&given4[i], right), make_uint4(own[i], rank, size, own[8 + i]));
  gpu::cluster_sync();
  out[blockIdx.x * 96 + 32 + i] = given[i];
  out[blockIdx.x * 96 + 64 + i] = reinterpret_cast<const uint32_t*>(given4)[i];
  gpu::cluster_arrive_relaxed();
  gpu::cluster_wait();
}

// Block 0 of the cluster hands x to the others in global memory.
__global__ void cluster_flags(const int* x, int* between, unsigned* words, int* out) {
  const int i = threadIdx.x;
  if (gpu::cluster_rank() == 0) {
    between[i] = x[i];
    gpu::add_release_cluster(words, 1);
    between[32 + i] = x[i] + 1;
    gpu::syncthreads();
    if (i == 0) gpu::store_release_cluster(words + 1, 1);
  } else {
    gpu::Spin spin("cluster_flags");
    while (gpu::load_acquire_cluster(words) != 32) spin();
    while (gpu::load_acquire_cluster(words + 1) != 1) spin();
    out[(blockIdx.x - 1) * 32 + i] = between[31 - i] + between[32 + i];
  }
}

// A ring of two buffers between two warps: full[] counts the producers' arrivals, empty[] the consumers'.
__global__ void mbarriers(const int* x, int* out, int rounds) {
  SHARED(uint64_t, full, [2]);
  SHARED(uint64_t, empty, [2]);
  SHARED(int, buffer, [2][32]);
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 2) {
    gpu::mbarrier_init(&full[threadIdx.x], 32);
    gpu::mbarrier_init(&empty[threadIdx.x], 32);
  }
  gpu::syncthreads();
  for (int i = 0; i < rounds; ++i) {
    const int slot = i % 2;
    const unsigned parity = i / 2 % 2;
    if (threadIdx.x < 32) {
      if (i >= 2) gpu::mbarrier_wait_block(&empty[slot], parity ^ 1);
      buffer[slot][lane] = x[i * 32 + lane];
      gpu::mbarrier_arrive(&full[slot]);
    } else {
      gpu::mbarrier_wait_block(&full[slot], parity);
      out[i * 32 + lane] = buffer[slot][31 - lane];
      gpu::mbarrier_arrive(&empty[slot]);
    }
  }
}

// Every block sends its numbers to all blocks of the cluster, which count the bytes; N words a store.
template <class T>
__global__ void async_stores(const uint32_t* x, uint32_t* out) {  // x [blocks, 32], out [blocks, blocks, 32]
  constexpr int kWords = sizeof(T) / 4;
  SHARED(uint64_t, arrived, [1]);
  SHARED(uint64_t, taken, [1]);
  SHARED(uint4, inbox, [16][8]);
  const unsigned rank = gpu::cluster_rank(), size = gpu::cluster_size();
  const int i = threadIdx.x;
  if (i == 0) {
    gpu::mbarrier_init(arrived, 1);
    gpu::mbarrier_init(taken, size);
    gpu::mbarrier_arrive_expect(arrived, size * 128);
  }
  gpu::cluster_sync();
  if (i * kWords < 32) {
    T value;
    memcpy(&value, x + rank * 32 + i * kWords, sizeof value);
    for (unsigned to = 0; to < size; ++to) {
      const gpu::ClusterAddress target = gpu::cluster_map(inbox, to) + static_cast<int>(rank * 128 + i * sizeof(T));
      gpu::st_async(target, value, gpu::cluster_map(arrived, to));
    }
  }
  gpu::mbarrier_wait(arrived, 0);
  for (unsigned from = 0; from < size; ++from) {
    out[(rank * size + from) * 32 + i] = reinterpret_cast<const uint32_t*>(inbox[from])[i];
  }
  gpu::syncthreads();
  if (i < static_cast<int>(size)) gpu::mbarrier_arrive_remote(gpu::cluster_map(taken, i));
  gpu::mbarrier_wait(taken, 0);  // all have read
  gpu::cluster_sync();
}

__global__ void bulk_loads(const int* x, int* out, int count) {
  DYN_SHARED(bytes);
  SHARED(uint64_t, landed, [1]);
  int* numbers = reinterpret_cast<int*>(bytes);
  if (threadIdx.x == 0) gpu::mbarrier_init(landed, 1);
  gpu::syncthreads();
  for (unsigned round = 0; round < 2; ++round) {
    if (threadIdx.x == 0) {
      gpu::mbarrier_arrive_expect(landed, count * 4);
      gpu::bulk_load(numbers, x + round * count, count * 4, landed);
    }
    gpu::mbarrier_wait_block(landed, round);
    for (int i = threadIdx.x; i < count; i += blockDim.x) out[round * count + i] = numbers[count - 1 - i];
    gpu::syncthreads();  // all have read
  }
}

template <class T>
void run_multiply(const program::Case& c) {
  gpu::launch(multiply<T>, dim3(1), dim3(32), 0, nullptr, c.array<uint32_t>("a"), c.array<uint32_t>("b"),
              c.array<float>("c"), c.array<float>("d"));
}
template <class T>
void run_conversions(const program::Case& c) {
  gpu::launch(conversions<T>, dim3(1), dim3(32), 0, nullptr, c.array<float>("x"), c.array<T>("single"),
              c.array<uint32_t>("pairs"), c.array<float>("back"));
}
template <int kBytes>
void run_copies(const program::Case& c) {
  gpu::launch(copies<kBytes>, dim3(1), dim3(32), 64 * kBytes, nullptr, c.array<unsigned char>("x"),
              c.array<unsigned char>("out"));
}
template <class T>
void run_async_stores(const program::Case& c) {
  gpu::launch_cluster(4, async_stores<T>, dim3(4), dim3(32), 0, nullptr, c.array<uint32_t>("x"),
                      c.array<uint32_t>("out"));
}

int main(int argc, char** argv) {
  using program::Case;
  const program::Entries entries{
      {"shuffles",
       [](const Case& c) {
         gpu::launch(shuffles, dim3(1), dim3(32), 0, nullptr, c.array<float>("x"), c.array<float>("out"));
       }},
      {"half_warps",
       [](const Case& c) {
         gpu::launch(half_warps, dim3(1), dim3(32), 0, nullptr, c.array<float>("x"), c.array<float>("out"),
                     c.array<unsigned>("votes"));
       }},
      {"static_shared",
       [](const Case& c) {
         gpu::launch(static_shared, dim3(2), dim3(32, 4), 0, nullptr, c.array<int>("x"), c.array<int>("out"));
       }},
      {"warp_exchange",
       [](const Case& c) {
         gpu::launch(warp_exchange, dim3(1), dim3(64), 64 * sizeof(int), nullptr, c.array<int>("x"),
                     c.array<int>("out"));
       }},
      {"named_barriers",
       [](const Case& c) {
         gpu::launch(named_barriers, dim3(1), dim3(64), 0, nullptr, c.array<int>("x"), c.array<int>("out"),
                     c.number("rounds"));
       }},
      {"copies4", run_copies<4>},
      {"copies8", run_copies<8>},
      {"copies16", run_copies<16>},
      {"matrices",
       [](const Case& c) {
         gpu::launch(matrices, dim3(1), dim3(32), 512, nullptr, c.array<uint16_t>("x"), c.array<uint32_t>("x1"),
                     c.array<uint32_t>("x2"), c.array<uint32_t>("x4"));
       }},
      {"multiply_bf16", run_multiply<bf16>},
      {"multiply_half", run_multiply<half>},
      {"conversions_bf16", run_conversions<bf16>},
      {"conversions_half", run_conversions<half>},
      {"approximations",
       [](const Case& c) {
         gpu::launch(approximations, dim3(1), dim3(32), 0, nullptr, c.array<float>("x"), c.array<float>("out"));
       }},
      {"loads",
       [](const Case& c) {
         gpu::launch(loads, dim3(1), dim3(32), 0, nullptr, c.array<float>("x"), c.array<float>("out"),
                     c.array<int>("later"));
       }},
      {"flags",
       [](const Case& c) {
         gpu::launch_cooperative(flags, dim3(2), dim3(32), 0, nullptr, c.array<int>("x"), c.array<int>("between"),
                                 c.array<unsigned>("words"), c.array<uint64_t>("carriers"), c.array<int>("out"));
       }},
      {"grid_barriers",
       [](const Case& c) {
         const int blocks = c.number("blocks");
         if (gpu::max_cooperative_blocks(grid_barriers, dim3(64), 0) < blocks) throw std::runtime_error("too many");
         gpu::launch_cooperative(grid_barriers, dim3(blocks), dim3(64), 0, nullptr, c.array<int>("a"),
                                 c.array<int>("b"), c.array<unsigned>("counter"), c.number("rounds"));
       }},
      {"cluster_memory",
       [](const Case& c) {
         if (gpu::max_active_clusters(4, cluster_memory, dim3(32), 0) < 1) throw std::runtime_error("does not fit");
         gpu::launch_cluster(4, cluster_memory, dim3(8), dim3(32), 0, nullptr, c.array<uint32_t>("x"),
                             c.array<uint32_t>("out"));
       }},
      {"cluster_flags",
       [](const Case& c) {
         gpu::launch_cluster(4, cluster_flags, dim3(4), dim3(32), 0, nullptr, c.array<int>("x"),
                             c.array<int>("between"), c.array<unsigned>("words"), c.array<int>("out"));
       }},
      {"mbarriers",
       [](const Case& c) {
         gpu::launch(mbarriers, dim3(1), dim3(64), 0, nullptr, c.array<int>("x"), c.array<int>("out"),
                     c.number("rounds"));
       }},
      {"async_stores4", run_async_stores<uint32_t>},
      {"async_stores8", run_async_stores<uint2>},
      {"async_stores16", run_async_stores<uint4>},
      {"bulk_loads",
       [](const Case& c) {
         const int count = c.number("count");
         gpu::launch(bulk_loads, dim3(1), dim3(32), count * sizeof(int), nullptr, c.array<int>("x"),
                     c.array<int>("out"), count);
       }},
      {"too_much_shared",
       [](const Case& c) {
         gpu::launch(loads, dim3(1), dim3(32), 1 << 20, nullptr, c.array<float>("x"), c.array<float>("out"),
                     c.array<int>("later"));
       }},
  };
  return program::run(argc, argv, entries);
}
