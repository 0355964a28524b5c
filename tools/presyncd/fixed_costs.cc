#include "tools/presyncd/fixed_costs.h"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>

namespace presync {
namespace {

// What a handover can take at the least and at the most.
constexpr absl::Duration kLeast = absl::Milliseconds(5);
constexpr absl::Duration kMost = absl::Seconds(2);
// Enough that two disturbed launches in a row don't count, few enough to follow a host that
// changes.
constexpr size_t kKept = 8;

void Keep(absl::Duration cost, std::vector<absl::Duration>* costs) {
  costs->push_back(std::clamp(cost, kLeast, kMost));
  if (costs->size() > kKept) costs->erase(costs->begin());
}

}  // namespace

FixedCosts::FixedCosts(std::string path) : path_(std::move(path)) {
  std::ifstream in(path_);
  const nlohmann::json json = nlohmann::json::parse(in, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return;
  for (const auto& [peer, launches] : json.items()) {
    if (!launches.is_array()) continue;
    for (const nlohmann::json& microseconds : launches) {
      if (!microseconds.is_number_integer()) continue;
      Keep(absl::Microseconds(microseconds.get<int64_t>()), &costs_[peer]);
    }
  }
}

absl::Duration FixedCosts::For(const std::string& peer, absl::Duration expected) const {
  std::vector<absl::Duration> costs = {expected};
  {
    MutexLock lock(&mutex_);
    const auto it = costs_.find(peer);
    if (it != costs_.end()) costs.insert(costs.end(), it->second.begin(), it->second.end());
  }
  const auto middle = costs.begin() + static_cast<std::ptrdiff_t>((costs.size() - 1) / 2);
  std::nth_element(costs.begin(), middle, costs.end());
  return *middle;
}

void FixedCosts::Learn(const std::string& peer, absl::Duration cost) {
  MutexLock lock(&mutex_);
  Keep(cost, &costs_[peer]);
  nlohmann::json json = nlohmann::json::object();
  for (const auto& [name, launches] : costs_) {
    for (const absl::Duration each : launches) {
      json[name].push_back(absl::ToInt64Microseconds(each));
    }
  }
  const std::string temporary = path_ + ".new";
  std::ofstream(temporary) << json.dump() << "\n";
  std::rename(temporary.c_str(), path_.c_str());
}

}  // namespace presync
