// Memory of the ops on the CPU: what they return, and what they need for the time of a call.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>

#include <cstdint>

#include "cpu/huge_pages.h"

namespace fastrnn {

// Large buffers are fresh memory at every call, and the first touch of a page costs more than writing it: 33 against 17 ms
// for 67 MB, with 4 KiB and 2 MiB a page.
inline at::Tensor with_huge_pages(at::Tensor buffer) {
  constexpr int64_t kWorthIt = 16 * kHugePage;  // malloc's largest threshold, so that it is mapped for itself
  const auto bytes = static_cast<int64_t>(buffer.nbytes());
  if (bytes >= kWorthIt) advise_huge_pages(buffer.mutable_data_ptr(), bytes);
  return buffer;
}

// Memory for the time of a call, aligned for vectors.
inline at::DataPtr temporary(int64_t bytes) { return c10::GetCPUAllocator()->allocate(bytes); }

// The same for a scan. Weights that fill L2 find less room in it where their pages happen to share its sets, and in some
// processes all calls take a fifth longer; the lines of a huge page lie in all sets alike.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    constexpr int64_t kWorthIt = 1 << 20;
    if (bytes < kWorthIt) {
      memory_ = temporary(bytes);
      begin_ = memory_.get();
      return;
    }
    memory_ = temporary(whole_huge_pages(bytes) + kHugePage);  // whose remainders are never touched
    begin_ = reinterpret_cast<void*>(whole_huge_pages(reinterpret_cast<intptr_t>(memory_.get())));
    advise_huge_pages(begin_, whole_huge_pages(bytes));
  }
  void* get() const { return begin_; }

 private:
  at::DataPtr memory_;
  void* begin_;
};

}  // namespace fastrnn
