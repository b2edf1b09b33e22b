// Two small persistent scans, h_t = tanh(x_t + W h_{t-1}), as real kernels would be built: over the whole grid (cp_async,
// ldmatrix, mma, grid_barrier) and over clusters (mma, st_async, mbarriers). `fault` plants one of the faults that the
// emulator, or ThreadSanitizer, must find.
#include "program.h"

using gpu::bf16;

namespace {
enum Fault {
  kNone,
  kNoCopyWait,
  kNoBlockBarrier,
  kRelaxed,
  kNotCooperative,
  kNoMbarrierWait,
  kOneBuffer,
  kNoClusterBarrier
};
constexpr int kPad = 8;  // columns: rows then begin in different banks
}  // namespace

GPU_FN void relaxed_grid_barrier(unsigned* counter, unsigned target) {
  gpu::syncthreads();
  if (threadIdx.x == 0) {
    gpu::add_relaxed_gpu(counter, 1);
    gpu::Spin spin("relaxed_grid_barrier");
    while (gpu::load_acquire_gpu(counter) < target) spin();
  }
  gpu::syncthreads();
}

// w [H, H], x [T, 16, H], out [T, 16, H]. A warp owns 8 units; W stays in shared memory.
__global__ void __launch_bounds__(256, 1)
    grid_scan(const bf16* w, const float* x, bf16* out, unsigned* counter, int steps, int hidden, int fault) {
  DYN_SHARED(bytes);
  constexpr int kBatch = 16;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, units = blockDim.x / 4, first = blockIdx.x * units;
  const int stride = hidden + kPad, chunks = hidden / 8;
  bf16* const weights = reinterpret_cast<bf16*>(bytes);  // [units, stride]
  bf16* const state = weights + units * stride;  // [16, stride]
  for (int i = threadIdx.x; i < units * chunks; i += blockDim.x) {
    const int row = i / chunks, column = i % chunks * 8;
    gpu::cp_async<16>(weights + row * stride + column, w + (first + row) * hidden + column);
  }
  for (int t = 0; t < steps; ++t) {
    for (int i = threadIdx.x; i < kBatch * chunks; i += blockDim.x) {
      const int row = i / chunks, column = i % chunks * 8;
      const bf16* from = t == 0 ? out : out + ((t - 1) * kBatch + row) * hidden + column;
      gpu::cp_async<16>(state + row * stride + column, from, t == 0 ? 0 : 16);
    }
    gpu::cp_async_commit();
    if (fault == kNoCopyWait) {
      gpu::cp_async_wait<1>();
    } else {
      gpu::cp_async_wait<0>();
    }
    if (fault != kNoBlockBarrier) gpu::syncthreads();
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
    for (int k = 0; k < hidden; k += 16) {
      uint32_t a[4], b[2];
      gpu::ldmatrix<4>(a, state + lane % 16 * stride + k + lane / 16 * 8);
      gpu::ldmatrix<2>(b, weights + (warp * 8 + lane % 8) * stride + k + lane / 8 % 2 * 8);
      gpu::mma_m16n8k16<bf16>(sum, a, b);
    }
    for (int half = 0; half < 2; ++half) {
      const int at = (t * kBatch + lane / 4 + half * 8) * hidden + first + warp * 8 + lane % 4 * 2;
      const uint32_t pair = gpu::pack<bf16>(tanhf(sum[2 * half] + x[at]), tanhf(sum[2 * half + 1] + x[at + 1]));
      *reinterpret_cast<uint32_t*>(out + at) = pair;
    }
    if (fault == kRelaxed) {
      relaxed_grid_barrier(counter, (t + 1) * gridDim.x);
    } else {
      gpu::grid_barrier(counter, (t + 1) * gridDim.x);
    }
  }
  gpu::cp_async_wait<0>();
}

// w [H, H], x [T, N, H], out [T, N, H]. A cluster takes 8 rows of the batch, a block of it a share of the units, a warp
// 16; every block has all of h, twice, and gets the others' part by st_async.
__global__ void __launch_bounds__(256, 1)
    cluster_scan(const bf16* w, const float* x, bf16* out, int steps, int batch, int hidden, int fault) {
  SHARED(uint64_t, arrived, [2]);
  DYN_SHARED(bytes);
  constexpr int kBatch = 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, pair = lane % 4 * 2;
  const int units = blockDim.x / 2, stride = hidden + kPad;
  const int size = gpu::cluster_size(), rank = gpu::cluster_rank();
  const int first = rank * units, first_row = blockIdx.x / size * kBatch;
  bf16* const state = reinterpret_cast<bf16*>(bytes);  // [2, 8, stride]
  bf16* const outgoing = state + 2 * kBatch * stride;  // [8, units]
  for (int i = threadIdx.x; i < kBatch * stride; i += blockDim.x) state[i] = gpu::from_float<bf16>(0.f);
  if (threadIdx.x < 2) gpu::mbarrier_init(&arrived[threadIdx.x], 1);
  if (fault == kNoClusterBarrier) {
    gpu::syncthreads();
  } else {
    gpu::cluster_sync();
  }
  const int buffers = fault == kOneBuffer ? 1 : 2;
  for (int t = 0; t < steps; ++t) {
    const int now = t % buffers, next = (t + 1) % buffers;
    if (t > 0 && fault != kNoMbarrierWait) gpu::mbarrier_wait(&arrived[now], (t - 1) / buffers % 2);
    const bf16* h = state + now * kBatch * stride;
    const bf16* rows = w + (first + warp * 16 + g) * hidden + pair;
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
    for (int k = 0; k < hidden; k += 16) {
      const auto word = [](const bf16* p) { return gpu::load_readonly(reinterpret_cast<const uint32_t*>(p)); };
      const uint32_t a[4] = {word(rows + k), word(rows + 8 * hidden + k), word(rows + k + 8),
                             word(rows + 8 * hidden + k + 8)};
      const auto* column = reinterpret_cast<const uint32_t*>(h + g * stride + k + pair);
      const uint32_t b[2] = {column[0], column[4]};
      gpu::mma_m16n8k16<bf16>(sum, a, b);
    }
    for (int i = 0; i < 4; ++i) {
      const int unit = warp * 16 + g + i / 2 * 8, row = pair + i % 2;
      const bool valid = first_row + row < batch;
      const int at = (t * batch + first_row + row) * hidden + first + unit;
      const bf16 value = gpu::from_float<bf16>(valid ? tanhf(sum[i] + x[at]) : 0.f);
      outgoing[row * units + unit] = value;
      if (valid) out[at] = value;
    }
    if (fault != kNoBlockBarrier) gpu::syncthreads();
    if (t + 1 < steps) {
      if (threadIdx.x == 0) gpu::mbarrier_arrive_expect(&arrived[next], kBatch * hidden * sizeof(bf16));
      for (int i = threadIdx.x; i < kBatch * units / 8; i += blockDim.x) {
        const int row = i / (units / 8), column = i % (units / 8) * 8;
        const uint4 chunk = *reinterpret_cast<const uint4*>(outgoing + row * units + column);
        bf16* const target = state + next * kBatch * stride + row * stride + first + column;
        for (int to = 0; to < size; ++to) {
          gpu::st_async(gpu::cluster_map(target, to), chunk, gpu::cluster_map(&arrived[next], to));
        }
      }
    }
    gpu::syncthreads();  // outgoing has been read
  }
}

int main(int argc, char** argv) {
  using program::Case;
  const program::Entries entries{
      {"grid_scan",
       [](const Case& c) {
         const int hidden = c.number("hidden"), blocks = c.number("blocks"), fault = c.number("fault");
         const int units = hidden / blocks;
         const size_t shared_bytes = (units + 16) * (hidden + kPad) * sizeof(bf16);
         const auto launch = [&](auto how) {
           how(grid_scan, dim3(blocks), dim3(units * 4), shared_bytes, cudaStream_t{}, c.array<bf16>("w"),
               c.array<float>("x"), c.array<bf16>("out"), c.array<unsigned>("counter"), c.number("steps"), hidden,
               fault);
         };
         if (fault == kNotCooperative) {
           launch([](auto... arguments) { gpu::launch(arguments...); });
         } else {
           launch([](auto... arguments) { gpu::launch_cooperative(arguments...); });
         }
       }},
      {"cluster_scan",
       [](const Case& c) {
         const int hidden = c.number("hidden"), cluster = c.number("cluster"), batch = c.number("batch");
         const int units = hidden / cluster;
         const size_t shared_bytes = (16 * (hidden + kPad) + 8 * units) * sizeof(bf16);
         gpu::launch_cluster(cluster, cluster_scan, dim3((batch + 7) / 8 * cluster), dim3(units * 2), shared_bytes,
                             nullptr, c.array<bf16>("w"), c.array<float>("x"), c.array<bf16>("out"), c.number("steps"),
                             batch, hidden, c.number("fault"));
       }},
  };
  return program::run(argc, argv, entries);
}
