#include "tools/presyncd/fixed_costs.h"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>

namespace presync {
namespace {

// Beyond these a launch was disturbed, and says nothing of the next one.
constexpr absl::Duration kLeast = absl::Milliseconds(5);
constexpr absl::Duration kMost = absl::Seconds(2);

}  // namespace

FixedCosts::FixedCosts(std::string path) : path_(std::move(path)) {
  std::ifstream in(path_);
  const nlohmann::json json = nlohmann::json::parse(in, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return;
  for (const auto& [peer, microseconds] : json.items()) {
    if (!microseconds.is_number_integer()) continue;
    costs_[peer] = std::clamp(absl::Microseconds(microseconds.get<int64_t>()), kLeast, kMost);
  }
}

absl::Duration FixedCosts::For(const std::string& peer, absl::Duration fallback) const {
  absl::MutexLock lock(&mutex_);
  const auto it = costs_.find(peer);
  return it == costs_.end() ? fallback : it->second;
}

void FixedCosts::Learn(const std::string& peer, absl::Duration cost) {
  cost = std::clamp(cost, kLeast, kMost);
  absl::MutexLock lock(&mutex_);
  const auto it = costs_.find(peer);
  costs_[peer] = it == costs_.end() ? cost : (it->second + cost) / 2;
  nlohmann::json json = nlohmann::json::object();
  for (const auto& [name, value] : costs_) json[name] = absl::ToInt64Microseconds(value);
  const std::string temporary = path_ + ".new";
  std::ofstream(temporary) << json.dump() << "\n";
  std::rename(temporary.c_str(), path_.c_str());
}

}  // namespace presync
