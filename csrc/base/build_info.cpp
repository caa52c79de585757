#include "base/build_info.h"

#include <sstream>

#include "build_config.h"

#if PGOLF_CUDA
#include "base/cuda_info.h"
#endif

namespace pgolf {
namespace {

std::vector<std::string> split_words(const std::string& text) {
  std::istringstream words(text);
  std::vector<std::string> found;
  for (std::string word; words >> word;) found.push_back(word);
  return found;
}

}  // namespace

BuildInfo build_info() {
  BuildInfo info{PGOLF_VERSION, PGOLF_COMPILER, PGOLF_BUILD_TYPE, PGOLF_SOURCES, false, "", {}, PGOLF_CUDA_REASON, 0};
#if PGOLF_CUDA
  info.cuda = true;
  info.cuda_version = cuda_version();
  info.cuda_archs = split_words(PGOLF_CUDA_ARCHS);
  info.cuda_devices = cuda_device_count();
#else
  (void)split_words;
#endif
  return info;
}

}  // namespace pgolf
