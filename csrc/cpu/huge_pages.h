// Memory on huge pages, as far as the system has them.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastrnn {

inline constexpr int64_t kHugePage = 2 << 20;  // bytes

inline int64_t whole_huge_pages(int64_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

// Asks for huge pages wherever whole ones lie in this memory. A hint that any system may ignore.
inline void advise_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  const auto begin = reinterpret_cast<intptr_t>(memory);
  const intptr_t first = whole_huge_pages(begin), end = (begin + bytes) / kHugePage * kHugePage;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fastrnn
