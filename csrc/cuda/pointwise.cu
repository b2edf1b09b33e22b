// The instantiations for every cell and storage type, and their launch.
#include "pointwise.cuh"

namespace fastrnn {
namespace {

constexpr unsigned kThreads = 256;        // of a block
constexpr int64_t kMostBlocks = 65535;    // in y and z; rows beyond are reached by a loop

template <class Kernel, class Params>
void launch(Kernel kernel, const Params& params, int64_t columns, void* stream) {
  const StepTable& table = params.table;
  int64_t rows = table.step[0].visited;
  if (table.directions == 2 && table.step[1].visited > rows) rows = table.step[1].visited;
  if (rows == 0 || columns == 0) return;
  unsigned width = 32;  // as wide as the columns need: narrow layers put several rows into a block
  while (width < kThreads && width < columns) width *= 2;
  const unsigned height = kThreads / width;
  const int64_t across = (columns + width - 1) / width, down = (rows + height - 1) / height;
  const dim3 grid(static_cast<unsigned>(across < kMostBlocks ? across : kMostBlocks),
                  static_cast<unsigned>(down < kMostBlocks ? down : kMostBlocks),
                  static_cast<unsigned>(table.directions));
  gpu::launch(kernel, grid, dim3(width, height), 0, static_cast<cudaStream_t>(stream), params);
}

// Calls f with a null pointer to the storage type.
template <class F>
void with_storage(Storage storage, const F& f) {
  switch (storage) {
    case Storage::kFloat:
      return f(static_cast<float*>(nullptr));
    case Storage::kDouble:
      return f(static_cast<double*>(nullptr));
    case Storage::kHalf:
      return f(static_cast<__half*>(nullptr));
    case Storage::kBFloat16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
  }
}

template <class T, class... Cells>
void forward_of(CellKind kind, const StepForward& params, void* stream, CellList<Cells...>) {
  using Kernel = void (*)(StepForward);
  static constexpr Kernel kKernels[] = {forward_step_kernel<Cells, T>...};
  launch(kKernels[static_cast<int>(kind)], params, params.units, stream);
}

template <class T, class... Cells>
void backward_of(CellKind kind, const StepBackward& params, void* stream, CellList<Cells...>) {
  using Kernel = void (*)(StepBackward);
  static constexpr Kernel kKernels[] = {backward_step_kernel<Cells, T>...};
  launch(kKernels[static_cast<int>(kind)], params, params.units, stream);
}

}  // namespace

void forward_step(CellKind kind, Storage storage, const StepForward& params, void* stream) {
  with_storage(storage, [&]<class T>(T*) { forward_of<T>(kind, params, stream, AllCells()); });
}
void forward_projected(Storage storage, const StepForward& params, void* stream) {
  with_storage(storage, [&]<class T>(T*) { launch(forward_projected_kernel<T>, params, params.outputs, stream); });
}
void backward_projected(Storage storage, const StepBackward& params, void* stream) {
  with_storage(storage, [&]<class T>(T*) { launch(backward_projected_kernel<T>, params, params.outputs, stream); });
}
void backward_step(CellKind kind, Storage storage, const StepBackward& params, void* stream) {
  with_storage(storage, [&]<class T>(T*) { backward_of<T>(kind, params, stream, AllCells()); });
}

}  // namespace fastrnn
