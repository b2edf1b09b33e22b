// The Python side of streaming sessions.
#pragma once

#include <pybind11/pybind11.h>

namespace fastrnn {

void bind_streaming(pybind11::module_& m);

}  // namespace fastrnn
