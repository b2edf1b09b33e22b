// Memory of the ops on the CPU: what they return, and what they need for the time of a call.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <utility>

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
// processes all calls take a fifth longer; the lines of a huge page lie in all sets alike. And where it lies last in its
// heap, malloc gives it back to the system after every call, to be touched anew in the next: each thread keeps one piece,
// of a few pages at most.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    constexpr int64_t kWorthIt = 1 << 20;
    if (bytes < kWorthIt) {
      piece_ = {temporary(bytes)};
      piece_.begin = piece_.memory.get();
      return;
    }
    if (bytes <= kept().bytes) {
      piece_ = std::exchange(kept(), {});
      return;
    }
    const int64_t whole = whole_huge_pages(bytes);
    piece_ = {temporary(whole + kHugePage), nullptr, whole};  // whose remainders are never touched
    piece_.begin = reinterpret_cast<void*>(whole_huge_pages(reinterpret_cast<intptr_t>(piece_.memory.get())));
    advise_huge_pages(piece_.begin, whole);
  }
  ~Scratch() {
    constexpr int64_t kMost = 2 * kHugePage;
    if (piece_.bytes > kept().bytes && piece_.bytes <= kMost) kept() = std::move(piece_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* get() const { return piece_.begin; }

 private:
  struct Piece {
    at::DataPtr memory;
    void* begin = nullptr;
    int64_t bytes = 0;  // in huge pages
  };
  static Piece& kept() {
    static thread_local Piece piece;
    return piece;
  }

  Piece piece_;
};

}  // namespace fastrnn
