// Every cell, in one order: a new one adds its name, its kind and its type here, and nowhere else in C++.
#pragma once

#include "core/cells/gru.h"
#include "core/cells/lstm.h"
#include "core/cells/rnn.h"

namespace fastrnn {

enum class CellKind { kRnnTanh, kRnnRelu, kLstm, kGru };

// The names of the ops begin with these.
inline constexpr const char* kCellNames[] = {"rnn_tanh", "rnn_relu", "lstm", "gru"};

template <class... Cells>
struct CellList {
  static constexpr int kSize = sizeof...(Cells);
};
using AllCells = CellList<RnnCell<Tanh>, RnnCell<Relu>, LstmCell<>, GruCell<>>;

inline constexpr int kCellKinds = AllCells::kSize;
static_assert(sizeof(kCellNames) / sizeof(kCellNames[0]) == kCellKinds);

}  // namespace fastrnn
