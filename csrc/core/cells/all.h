// Every cell, in one order: a new one adds its name, its kind and its type here, and nowhere else in C++.
#pragma once

#include <array>

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

// What the code around the scans must know of a cell.
struct CellTraits {
  int gates = 0;           // G
  int separate = 0;        // S
  int saved = 0;           // columns of the reserve, in units of H
  int states = 0;          // h, and c where there is one
  bool carries_h = false;  // part of a step's gradient flows to h_{t-1} element by element
  bool projects = false;   // a layer may have a projection
};

template <class... Cells>
constexpr std::array<CellTraits, sizeof...(Cells)> traits_of(CellList<Cells...>) {
  return {CellTraits{Cells::kGates, Cells::kSeparate, Cells::kSaved, kStates<Cells>,
                     Cells::kState == ElementState::kHidden, Cells::kProjects}...};
}
inline constexpr auto kCellTraits = traits_of(AllCells());

constexpr const CellTraits& traits(CellKind kind) { return kCellTraits[static_cast<size_t>(kind)]; }

}  // namespace fastrnn
