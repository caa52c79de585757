// Large zeroed arrays that take physical memory only where they are touched, in huge pages where the system has them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)  // the sanitizer watches the ends of what malloc gave
#define PGOLF_MAPS_MEMORY 1
#include <sys/mman.h>
#else
#define PGOLF_MAPS_MEMORY 0
#include <cstdlib>
#include <cstring>
#endif

namespace pgolf {

// `count` values of a plain type, all bytes zero, aligned to a cache line at least. Throws std::bad_alloc.
template <class Value>
class ZeroedArray {
 public:
  explicit ZeroedArray(size_t count) : count_(count), bytes_(count * sizeof(Value) + !count) {
#if PGOLF_MAPS_MEMORY
    void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    madvise(memory, bytes_, MADV_HUGEPAGE);  // a look-up that misses the cache then seldom misses the TLB as well
#else
    bytes_ = (bytes_ + 63) / 64 * 64;
    void* memory = std::aligned_alloc(64, bytes_);
    if (!memory) throw std::bad_alloc();
    std::memset(memory, 0, bytes_);
#endif
    values_ = static_cast<Value*>(memory);
  }
  ~ZeroedArray() {
#if PGOLF_MAPS_MEMORY
    munmap(values_, bytes_);
#else
    std::free(values_);
#endif
  }
  ZeroedArray(const ZeroedArray&) = delete;
  ZeroedArray& operator=(const ZeroedArray&) = delete;

  Value* data() { return values_; }
  const Value* data() const { return values_; }
  size_t size() const { return count_; }
  Value& operator[](size_t i) { return values_[i]; }
  const Value& operator[](size_t i) const { return values_[i]; }

 private:
  size_t count_, bytes_;
  Value* values_;
};

inline void prefetch(const void* address) { __builtin_prefetch(address); }

}  // namespace pgolf
