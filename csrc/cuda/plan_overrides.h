// FUSED_ROPE_PLAN="vector=8 threads=64 keep=0 evict=0 work=96": a plan by hand, for experiments
// and tests. Only builds with the CMake option FUSED_ROPE_PLAN_OVERRIDES read it.
#pragma once

#include <charconv>
#include <sstream>
#include <stdexcept>
#include <string>

#include "fused_rope/kernels/plan.h"

namespace fused_rope::kernels {

// Throws std::invalid_argument for words that it does not know.
inline PlanOverrides parse_overrides(const std::string& text) {
  PlanOverrides overrides;
  const std::pair<const char*, int*> names[] = {
      {"vector", &overrides.vector}, {"threads", &overrides.threads}, {"keep", &overrides.keep},
      {"evict", &overrides.evict},   {"work", &overrides.work},       {"full", &overrides.full}};
  std::istringstream words(text);
  for (std::string word; words >> word;) {
    const size_t equals = word.find('=');
    bool known = false;
    for (const auto& [name, value] : names) {
      if (equals == std::string::npos || word.substr(0, equals) != name) continue;
      const char* const end = word.data() + word.size();
      const auto parsed = std::from_chars(word.data() + equals + 1, end, *value);
      known = parsed.ec == std::errc() && parsed.ptr == end && *value >= 0;
    }
    if (!known) {
      throw std::invalid_argument(
          "FUSED_ROPE_PLAN: expected vector=, threads=, keep=, evict=, work= or full= and a "
          "number, "
          "got " +
          word);
    }
  }
  return overrides;
}

}  // namespace fused_rope::kernels
