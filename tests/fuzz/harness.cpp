// Runs a fuzz target: for libFuzzer (PGOLF_LIBFUZZER), or by a main of its own.
//
//   target SEED MUTATIONS INPUT...   every input, a file, as it is and MUTATIONS times changed at random; prints how
//                                    many were refused, how many valid, and the most CPU seconds that one took
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <ctime>
#include <fstream>
#include <iterator>
#include <random>

#include "target.h"

// AddressSanitizer's; not every compiler has the header.
extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*)(const volatile void*, size_t),
                                                         void (*)(const volatile void*));

namespace {

std::atomic<size_t> largest{0};

void see_allocation(const volatile void*, size_t size) {
  for (size_t before = largest; before < size && !largest.compare_exchange_weak(before, size);) {
  }
}

void see_release(const volatile void*) {}

const int hooks = __sanitizer_install_malloc_and_free_hooks(see_allocation, see_release);

struct Counts {
  uint64_t refused, valid;
};

// In the file that PGOLF_FUZZ_COUNTS names, 16 bytes, where a process that is killed leaves them.
Counts& counts() {
  static Counts own = {};
  static Counts* const all = [] {
    const char* path = std::getenv("PGOLF_FUZZ_COUNTS");
    const int file = path ? open(path, O_RDWR) : -1;
    if (file < 0) return &own;
    void* shared = mmap(nullptr, sizeof own, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    return shared == MAP_FAILED ? &own : static_cast<Counts*>(shared);
  }();
  return *all;
}

}  // namespace

size_t fuzz::largest_allocation() {
  if (!hooks) fail("no hook of malloc");
  return largest.exchange(0);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  ++(fuzz::read(data, size) ? counts().valid : counts().refused);
  return 0;
}

#ifndef PGOLF_LIBFUZZER
namespace {

using Bytes = std::vector<uint8_t>;

Bytes mutate(Bytes data, std::mt19937_64& random) {
  auto below = [&](uint64_t limit) { return random() % limit; };
  for (uint64_t changes = 1 + below(3); changes > 0 && !data.empty(); --changes) {
    const uint64_t at = below(2) ? below(std::min<uint64_t>(data.size(), 24)) : below(data.size());
    switch (below(6)) {
      case 0: data[at] ^= 1 << below(8); break;
      case 1: data[at] = static_cast<uint8_t>(random()); break;
      case 2: data.resize(at); break;
      case 3: data.erase(data.begin() + at, data.begin() + std::min<uint64_t>(data.size(), at + 1 + below(9))); break;
      case 4: data.insert(data.begin() + at, 1 + below(9), static_cast<uint8_t>(random())); break;
      default: std::fill(data.begin() + at, data.end(), below(2) ? 0 : 255);
    }
  }
  data.shrink_to_fit();  // so that the sanitizer sees a byte too far
  return data;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 3) return 2;
  std::mt19937_64 random(std::strtoull(arguments[1], nullptr, 10));
  double longest = 0;
  for (int i = 3; i < count; ++i) {
    std::ifstream file(arguments[i], std::ios::binary);
    const Bytes whole(std::istreambuf_iterator<char>(file), {});
    for (int j = std::atoi(arguments[2]); j >= 0; --j) {
      const Bytes input = j ? mutate(whole, random) : Bytes(whole);
      const std::clock_t begin = std::clock();
      LLVMFuzzerTestOneInput(input.data(), input.size());
      longest = std::max(longest, static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC);
    }
  }
  std::printf("%llu %llu %.3f\n", static_cast<unsigned long long>(counts().refused),
              static_cast<unsigned long long>(counts().valid), longest);
  return 0;
}
#endif
