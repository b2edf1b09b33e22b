// A backward scan some steps at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"

namespace fastrnn {

// Steps of a layer, and the rows that their gate gradients lie in.
struct StepRange {
  int64_t begin, end;  // steps
  int64_t first, rows;  // the first row, and how many there are
};

// The steps of a backward scan in windows: what a window leaves is multiplied while it is in cache, and its memory is
// the next one's. Their buffer begins with the rows of the step visited before, whose gradients flow into the window.
class Windows {
 public:
  // visited: [T+1] the rows before each step, and all. window: steps.
  Windows(const Rows& rows, const std::vector<int64_t>& visited, int64_t window)
      : rows_(rows), visited_(visited), window_(window), offset_(rows.steps) {}

  int64_t rows() const {  // of the buffer
    int64_t most = 0;
    for (int64_t t = 0; t < rows_.steps; ++t) {
      most = std::max(most, visited_[std::min(t + window_, rows_.steps)] - visited_[t]);
    }
    return rows_.batch + most;
  }
  const int64_t* offset() const { return offset_.data(); }  // [T] where a step's rows begin, as far as it is there

  // f(the scan of a window, its steps, its rows of the buffer) in the order of visits.
  template <class F>
  void each(Scan scan, bool reverse, const at::Tensor& buffer, const F& f) {
    for (int64_t visit = 0; visit < rows_.steps; visit += window_) {
      scan.first_visit = visit;
      scan.end_visit = std::min(visit + window_, rows_.steps);
      const int64_t begin = reverse ? visit : rows_.steps - scan.end_visit;
      const int64_t end = reverse ? scan.end_visit : rows_.steps - visit;
      for (int64_t t = begin; t < end; ++t) offset_[t] = rows_.batch + visited_[t] - visited_[begin];
      const StepRange range{begin, end, visited_[begin], visited_[end] - visited_[begin]};
      f(scan, range, buffer.narrow(0, rows_.batch, range.rows));
      const int64_t last = reverse ? end - 1 : begin, count = rows_.active[last];
      buffer.narrow(0, 0, count).copy_(buffer.narrow(0, offset_[last], count));
      offset_[last] = 0;
    }
  }

 private:
  const Rows& rows_;
  const std::vector<int64_t>& visited_;
  const int64_t window_;
  std::vector<int64_t> offset_;
};

}  // namespace fastrnn
