// The recurrent weights, packed for tensor cores: a fragment of 16 x 16 numbers is 32 lanes of 16 bytes, and a warp's
// fragments follow each other in the order of its products. And the layout of packed batches, on its way to the device.
#include "persistent_launch.cuh"

namespace fastrnn {
namespace {

struct Packing {
  CudaPlan plan;
  const void* weights[2];  // 16-bit [G*H, H] of each direction
  void* packed;  // uint4 [D, cluster, warps, steps, row_tiles, 32 lanes]
  bool backward;
  int gates;
  int64_t units;  // H
  int64_t fragments;  // of all directions, lanes included
};

// The weight at row m of a warp's tiles and column k of a block's products, as bits: zero beyond the matrix.
GPU_FN uint32_t weight_bits(const Packing& p, const uint16_t* weights, int rank, int warp, int m, int k) {
  int64_t row, column;
  if (p.backward) {  // W^T: a row for every unit of the layer, a column for every gate of the block's units
    const int gate = k / p.plan.units, unit = rank * p.plan.units + k % p.plan.units;
    row = gate < p.gates && unit < p.units ? gate * p.units + unit : -1;
    column = warp * p.plan.row_tiles * kMatrixRows + m;
  } else {  // a row for every gate of the warp's units, 8 units at a time
    const int octet = m / 8 / p.gates, unit = (rank * p.plan.warps + warp) * p.plan.octets * 8 + octet * 8 + m % 8;
    row = octet < p.plan.octets && unit < p.units ? m / 8 % p.gates * p.units + unit : -1;
    column = k;
  }
  return row >= 0 && column < p.units ? weights[row * p.units + column] : 0;
}

__global__ void pack_weights_kernel(const Packing p) {
  const CudaPlan& plan = p.plan;
  const int steps = plan.register_steps + plan.shared_steps;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < p.fragments;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int lane = static_cast<int>(i % 32), tile = static_cast<int>(i / 32 % plan.row_tiles);
    int64_t rest = i / 32 / plan.row_tiles;
    const int step = static_cast<int>(rest % steps);
    rest /= steps;
    const int warp = static_cast<int>(rest % plan.warps), rank = static_cast<int>(rest / plan.warps % plan.cluster);
    // no index into the parameters: it would put them into local memory
    const void* of_direction = rest / plan.warps / plan.cluster == 0 ? p.weights[0] : p.weights[1];
    const auto* weights = static_cast<const uint16_t*>(of_direction);
    const auto pair = [&](int half_of_rows, int half_of_columns) {
      const int m = tile * kMatrixRows + lane / 4 + half_of_rows * 8;
      const int k = step * 16 + lane % 4 * 2 + half_of_columns * 8;
      return weight_bits(p, weights, rank, warp, m, k) | weight_bits(p, weights, rank, warp, m, k + 1) << 16;
    };
    static_cast<uint4*>(p.packed)[i] = make_uint4(pair(0, 0), pair(1, 0), pair(0, 1), pair(1, 1));
  }
}

constexpr int kNumbersAtOnce = 480;  // with the rest less than the 4 KiB that arguments of a kernel may have

struct Numbers {
  int64_t values[kNumbersAtOnce];
  int64_t* to;
  int count;
};

__global__ void copy_numbers_kernel(const Numbers p) {
  for (int i = static_cast<int>(threadIdx.x); i < p.count; i += static_cast<int>(blockDim.x)) p.to[i] = p.values[i];
}

}  // namespace

void pack_weights(const PersistentScan& scan, bool backward, int gates, int64_t units, int directions, void* stream) {
  const int64_t fragments = scan.plan.fragments(directions);
  constexpr int64_t kThreads = 256, kMostBlocks = 4096;
  const int64_t blocks = (fragments + kThreads - 1) / kThreads;
  const Packing packing{scan.plan, {scan.weights[0], scan.weights[1]}, scan.packed, backward, gates, units, fragments};
  gpu::launch(pack_weights_kernel, dim3(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks)),
              dim3(kThreads), 0, static_cast<cudaStream_t>(stream), packing);
}

void copy_numbers(const int64_t* from, int64_t count, int64_t* to, void* stream) {
  constexpr int kThreads = 128;
  for (int64_t first = 0; first < count; first += kNumbersAtOnce) {
    const int64_t left = count - first;
    Numbers numbers{{}, to + first, static_cast<int>(left < kNumbersAtOnce ? left : kNumbersAtOnce)};
    memcpy(numbers.values, from + first, numbers.count * sizeof *from);
    gpu::launch(copy_numbers_kernel, dim3(1), dim3(kThreads), 0, static_cast<cudaStream_t>(stream), numbers);
  }
}

}  // namespace fastrnn
