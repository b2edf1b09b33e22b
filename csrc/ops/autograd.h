// What a call wants of autograd.
#pragma once

#include <torch/csrc/autograd/functions/utils.h>

#include <algorithm>

#include "ops/ops.h"

namespace fastrnn {

inline bool any_requires_grad(TensorList tensors) {
  return torch::autograd::GradMode::is_enabled() &&
         std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.defined() && t.requires_grad(); });
}

inline bool any_has_tangent(TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const Tensor& t) { return torch::autograd::isFwGradDefined(t); });
}

}  // namespace fastrnn
