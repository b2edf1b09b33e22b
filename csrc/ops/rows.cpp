#include "ops/rows.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <numeric>

namespace fastrnn {

RowTable::RowTable(const Layout& layout, const Tensor& input, const OptionalTensor& lengths,
                   const OptionalTensor& reset, const OptionalTensor& batch_sizes, bool batch_first) {
  const int64_t steps = layout.steps.expect_int(), batch = layout.batch.expect_int();
  table_.resize(2 * steps + 2 * batch);
  int64_t* offset = table_.data();
  int64_t* active = offset + steps;
  int64_t* order = active + steps;
  int64_t* length = order + batch;
  rows_.steps = steps;
  rows_.batch = batch;
  rows_.offset = offset;
  rows_.active = active;
  rows_.order = order;
  rows_.length = length;
  std::iota(order, order + batch, int64_t{0});

  if (batch_sizes.has_value()) {
    const Tensor sizes = batch_sizes->contiguous();
    const int64_t* size = sizes.const_data_ptr<int64_t>();
    rows_.batch_stride = 1;
    for (int64_t t = 0; t < steps; ++t) {
      TORCH_CHECK(size[t] > 0 && size[t] <= (t == 0 ? batch : size[t - 1]),
                  "batch_sizes should be positive, not increasing, and begin with the batch size ", batch, ", got ",
                  size[t], " at step ", t);
      offset[t] = total_;
      active[t] = size[t];
      total_ += size[t];
      std::fill_n(length, size[t], t + 1);
    }
    TORCH_CHECK(size[0] == batch, "batch_sizes should begin with the batch size ", batch, ", got ", size[0]);
    TORCH_CHECK(total_ == input.size(0), "Expected batch_sizes to add up to ", input.size(0), " rows, got ", total_);
    ragged_ = batch > 0 && length[batch - 1] < steps;
    return;
  }

  rows_.batch_stride = batch_first ? steps : 1;
  for (int64_t t = 0; t < steps; ++t) offset[t] = batch_first ? t : t * batch;
  std::fill_n(active, steps, batch);
  std::fill_n(length, batch, steps);
  total_ = steps * batch;

  if (lengths.has_value()) {
    const Tensor values = lengths->contiguous();
    std::copy_n(values.const_data_ptr<int64_t>(), batch, length);
    for (int64_t n = 0; n < batch; ++n) {
      TORCH_CHECK(length[n] >= 0 && length[n] <= steps, "lengths should be between 0 and ", steps, ", got ", length[n],
                  " at index ", n);
    }
    std::stable_sort(order, order + batch, [&](int64_t a, int64_t b) { return length[a] > length[b]; });
    int64_t count = batch;
    for (int64_t t = 0; t < steps; ++t) {
      while (count > 0 && length[order[count - 1]] <= t) --count;
      active[t] = count;
    }
    padded_ = ragged_ = batch > 0 && length[order[batch - 1]] < steps;
  }
  if (reset.has_value()) {
    reset_ = reset->contiguous();
    rows_.reset = reset_.const_data_ptr<bool>();
    rows_.reset_step_stride = batch_first ? 1 : batch;
    rows_.reset_batch_stride = batch_first ? steps : 1;
  }
}

std::vector<int64_t> RowTable::visited_before() const {
  std::vector<int64_t> before(rows_.steps + 1);
  std::inclusive_scan(rows_.active, rows_.active + rows_.steps, before.begin() + 1);
  return before;
}

std::optional<Tensor> RowTable::valid_rows() const {
  if (!padded_) return std::nullopt;
  const int64_t count = std::accumulate(rows_.length, rows_.length + rows_.batch, int64_t{0});
  Tensor index = at::empty({count}, at::kLong);
  int64_t* p = index.mutable_data_ptr<int64_t>();
  for (int64_t t = 0; t < rows_.steps; ++t) {
    for (int64_t i = 0; i < rows_.active[t]; ++i) *p++ = rows_.row(t, rows_.order[i]);
  }
  return index;
}

}  // namespace fastrnn
