// How this extension was built and what it found on the machine it runs on.
#pragma once

#include <string>
#include <vector>

namespace pgolf {

struct BuildInfo {
  std::string version, compiler, build_type;
  std::string sources;  // their SHA-256, as pgolf/runtime/sources.py computes it; "" when setup.py did not run the build
  bool cuda;
  std::string cuda_version;             // of the toolkit, "13.0"; "" without CUDA
  std::vector<std::string> cuda_archs;  // "90a", ...
  std::string cuda_reason;              // why CUDA is off, in one line; "" when it is on
  int cuda_devices;                     // 0 also where there is no driver
};

BuildInfo build_info();

}  // namespace pgolf
