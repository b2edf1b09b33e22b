// Which rows a layer visits, read once from lengths, reset or batch_sizes (on the CPU).
#pragma once

#include <ATen/core/Tensor.h>

#include <c10/util/SmallVector.h>

#include <optional>

#include "core/params.h"
#include "ops/checks.h"

namespace fastrnn {

class RowTable {
 public:
  RowTable(const Layout& layout, const Tensor& input, const OptionalTensor& lengths, const OptionalTensor& reset,
           const OptionalTensor& batch_sizes, bool batch_first);
  RowTable(const RowTable&) = delete;  // rows_ points into table_
  RowTable& operator=(const RowTable&) = delete;

  const Rows& rows() const { return rows_; }
  // Rows of unequal length.
  bool ragged() const { return ragged_; }
  // Rows of the data, valid or not: T * N, or those of a packed batch.
  int64_t total() const { return total_; }
  // Are some rows of the data not valid?
  bool padded() const { return padded_; }
  // The valid rows in the order of the scan's visits, if some are not.
  std::optional<Tensor> valid_rows() const;
  // [T+1] how many of them come before those of a step, and in the end how many there are.
  std::vector<int64_t> visited_before() const;

 private:
  Rows rows_;
  c10::SmallVector<int64_t, 16> table_;  // offset [T], active [T], order [N], length [N]
  Tensor reset_;                // keeps the memory that rows_ points to
  bool ragged_ = false;
  bool padded_ = false;
  int64_t total_ = 0;
};

}  // namespace fastrnn
