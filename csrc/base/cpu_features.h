// What this CPU can do, found when the program runs, and the code path that follows from it.
#pragma once

#include <string>
#include <vector>

namespace pgolf {

// In this order. bmi2 means fast bit deposit and extract on top of AVX2 and FMA, avx512vbmi AVX-512 on top of that.
enum class Level { portable, avx2, bmi2, avx512vbmi };

// Names of the instruction sets found, of those that matter here.
std::vector<std::string> cpu_features();

// Levels that this CPU runs, slowest first; "portable" is always one of them.
std::vector<std::string> levels();

// The level in use: at first the last of levels().
Level level();
std::string level_name();

// The level that PGOLF_CPU_LEVEL names, where it is set; throws as set_level.
void set_level_of_environment();

// Throws std::invalid_argument when `name` is not one of levels().
void set_level(const std::string& name);

}  // namespace pgolf
