// Large tensors in huge pages: their first writes are then a few hundred page faults, not a hundred
// thousand.

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "operators.h"

namespace flowrl {

// Advice on memory that nobody has written yet; the system may ignore it, and results are the same.
void prefer_huge_pages(Tensor tensor) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096, kWorthwhile = 4 << 20;
  const auto start = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t bytes = tensor.numel() * tensor.element_size();
  if (bytes < kWorthwhile) return;
  const uintptr_t first = (start + kPage - 1) / kPage * kPage, last = (start + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)tensor;
#endif
}

}  // namespace flowrl
