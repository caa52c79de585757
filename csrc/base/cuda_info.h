// The CUDA toolkit of the build and the devices of the machine. Only in CUDA builds.
#pragma once

#include <string>

namespace pgolf {

std::string cuda_version();  // "13.0"
int cuda_device_count();     // 0 where there is no driver

}  // namespace pgolf
