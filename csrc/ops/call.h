// The ops of the layers, called from Python.
#pragma once

#include <pybind11/pybind11.h>

namespace fastrnn {

void bind_layers(pybind11::module_& m);

}  // namespace fastrnn
