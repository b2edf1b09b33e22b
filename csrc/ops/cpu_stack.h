// The layers of a stack beside one another.
#pragma once

#include <optional>

#include "ops/ops.h"

namespace fastrnn {

// Is it worth asking for that? Cheap: most calls that have to go another way take ten microseconds.
bool may_run_side_by_side(int64_t layers, const Tensor& input, bool batch_first);

// All layers of a stack of one direction at once, each on a thread of its own some steps behind the one below, where that
// is faster than one after another and nobody wants more of the call than its results: no gradient, no transform, no
// autocast. To be called where may_run_side_by_side says so. Returns output, and h_n and c_n of all layers; nothing, and
// has done nothing, where the layers had better be called each. hx: none, or of each state [L, N, *]; weights: layer by
// layer.
std::optional<Tensors> layers_side_by_side(CellKind kind, int64_t layers, const Tensor& input, TensorList hx,
                                           TensorList weights, const OptionalTensor& lengths,
                                           const OptionalTensor& reset, const OptionalTensor& batch_sizes,
                                           bool batch_first);

}  // namespace fastrnn
