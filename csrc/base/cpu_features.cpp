#include "base/cpu_features.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pgolf {
namespace {

const char* const names[] = {"portable", "avx2", "bmi2", "avx512vbmi"};

#if defined(__x86_64__)
bool is_vendor(const char* name) {
  unsigned eax, text[3] = {};
  __get_cpuid(0, &eax, &text[0], &text[2], &text[1]);
  return std::equal(name, name + 12, reinterpret_cast<const char*>(text));
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

// pdep and pext take tens to hundreds of cycles on AMD before family 0x19 (Zen 3), and on Hygon's Zen 1.
bool has_fast_bmi2() {
  if (!__builtin_cpu_supports("bmi2") || is_vendor("HygonGenuine")) return false;
  unsigned eax = 0, ebx, ecx, edx;
  __get_cpuid(1, &eax, &ebx, &ecx, &edx);
  const unsigned family = ((eax >> 8) & 0xf) + ((eax >> 20) & 0xff);
  return !is_vendor("AuthenticAMD") || family >= 0x19;
}

bool has_vbmi() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vbmi");
}
#endif

std::vector<Level> find_levels() {
  std::vector<Level> found = {Level::portable};
#if defined(__x86_64__)
  if (!has_avx2()) return found;
  found.push_back(Level::avx2);
  if (has_fast_bmi2()) found.push_back(Level::bmi2);
  if (has_vbmi()) found.push_back(Level::avx512vbmi);
#endif
  return found;
}

const std::vector<Level>& available() {
  static const std::vector<Level> found = find_levels();
  return found;
}

std::atomic<Level>& current() {
  static std::atomic<Level> value{available().back()};
  return value;
}

}  // namespace

std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("sse4.2")) found.push_back("sse4.2");
  if (__builtin_cpu_supports("avx2")) found.push_back("avx2");
  if (__builtin_cpu_supports("fma")) found.push_back("fma");
  if (__builtin_cpu_supports("bmi2")) found.push_back("bmi2");
  if (__builtin_cpu_supports("avx512f")) found.push_back("avx512f");
  if (__builtin_cpu_supports("avx512bw")) found.push_back("avx512bw");
  if (__builtin_cpu_supports("avx512vbmi")) found.push_back("avx512vbmi");
#elif defined(__aarch64__)
  found.push_back("neon");
#endif
  return found;
}

std::vector<std::string> levels() {
  std::vector<std::string> found;
  for (Level each : available()) found.push_back(names[static_cast<int>(each)]);
  return found;
}

Level level() { return current().load(std::memory_order_relaxed); }

std::string level_name() { return names[static_cast<int>(level())]; }

void set_level_of_environment() {
  const char* const name = std::getenv("PGOLF_CPU_LEVEL");
  if (!name || !*name) return;
  try {
    set_level(name);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string("PGOLF_CPU_LEVEL: ") + error.what());
  }
}

void set_level(const std::string& name) {
  std::string accepted;
  for (Level each : available()) {
    const std::string its_name = names[static_cast<int>(each)];
    if (name == its_name) {
      current().store(each, std::memory_order_relaxed);
      return;
    }
    accepted += (accepted.empty() ? "" : ", ") + its_name;
  }
  throw std::invalid_argument("level is '" + name + "', this CPU accepts: " + accepted);
}

}  // namespace pgolf
