#include "gate_plan.h"

#include <algorithm>
#include <numeric>
#include <sstream>
#include <stdexcept>

namespace cegate {
namespace {

const char* const kNames[kKinds] = {"spatial", "semantic", "frequency"};

template <typename... Parts>
void require(bool good, const Parts&... parts) {
  if (good) return;
  std::ostringstream message;
  message << "GatePlan: ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

void check_gates(const std::vector<std::vector<std::vector<int64_t>>>& gates, int64_t layers) {
  for (size_t b = 0; b < gates.size(); ++b) {
    require(gates[b].size() == kKinds, "gates[", b, "] has ", gates[b].size(), " rows, expected 3 (spatial, semantic, frequency)");
    for (int64_t kind = 0; kind < kKinds; ++kind) {
      const auto& row = gates[b][kind];
      require(
          static_cast<int64_t>(row.size()) == layers, "gates[", b, "][", kind, "] has ", row.size(),
          " layers, the first row has ", layers);
      for (int64_t layer = 0; layer < layers; ++layer)
        require(
            row[layer] == 0 || row[layer] == 1, "gate ", kNames[kind], ".", layer, " of sample ", b, " is ", row[layer],
            ", accepted are 0 and 1");
    }
  }
}

}  // namespace

GatePlan::GatePlan(
    const std::vector<std::vector<std::vector<int64_t>>>& gates, std::vector<int64_t> adapters,
    const std::array<int64_t, kKinds>& weights)
    : adapters_(std::move(adapters)) {
  require(!gates.empty(), "gates is empty, expected [3, L] or [B, 3, L]");
  layers_ = gates[0].empty() ? 0 : static_cast<int64_t>(gates[0][0].size());
  check_gates(gates, layers_);
  const int64_t rows = static_cast<int64_t>(gates.size()), named = static_cast<int64_t>(adapters_.size());
  require(rows == 1 || named == 0 || named == rows, "adapters has ", named, " entries for gates of ", rows, " samples");
  for (int64_t b = 0; b < named; ++b) require(adapters_[b] >= 0, "adapters[", b, "] is ", adapters_[b], ", accepted are 0 and more");
  for (int64_t kind = 0; kind < kKinds; ++kind)
    require(weights[kind] >= 0, "a ", kNames[kind], " site has ", weights[kind], " weights, accepted are 0 and more");
  samples_ = std::max(named, rows == 1 ? 0 : rows);

  offsets_.assign(kKinds * layers_, -1);
  assignments_.resize(kKinds * layers_);
  for (int64_t kind = 0; kind < kKinds; ++kind) {
    for (int64_t layer = 0; layer < layers_; ++layer) {
      auto& assignment = assignments_[kind * layers_ + layer];
      bool any = rows == 1 && gates[0][kind][layer];
      for (int64_t b = 0; b < samples_; ++b) {
        const bool on = gates[rows == 1 ? 0 : b][kind][layer];
        assignment.push_back(on ? (named ? adapters_[b] : 0) : -1);
        any = any || on;
      }
      // every sample, and one set of weights: the whole batch, no dispatch at all
      const bool whole = !named && std::count(assignment.begin(), assignment.end(), 0) == samples_;
      if (whole) assignment.clear();
      if (!any) continue;
      offsets_[kind * layers_ + layer] = packed_;
      packed_ += weights[kind];
      first_layer_ = first_layer_ < 0 ? layer : std::min(first_layer_, layer);
      last_layer_ = std::max(last_layer_, layer);
    }
  }
}

int64_t GatePlan::index(int64_t kind, int64_t layer) const {
  if (kind < 0 || kind >= kKinds || layer < 0 || layer >= layers_) {
    std::ostringstream message;
    message << "GatePlan: kind " << kind << ", layer " << layer << " is outside 0..2, 0.." << layers_ - 1;
    throw std::out_of_range(message.str());
  }
  return kind * layers_ + layer;
}

int64_t GatePlan::offset(int64_t kind, int64_t layer) const { return offsets_[index(kind, layer)]; }

const std::vector<int64_t>& GatePlan::assignment(int64_t kind, int64_t layer) const {
  return assignments_[index(kind, layer)];
}

std::vector<int64_t> GatePlan::order() const {
  std::vector<int64_t> result(samples_);
  std::iota(result.begin(), result.end(), 0);
  if (!adapters_.empty())
    std::stable_sort(result.begin(), result.end(), [&](int64_t a, int64_t b) { return adapters_[a] < adapters_[b]; });
  return result;
}

std::string GatePlan::text() const {
  std::ostringstream text;
  text << "GatePlan(" << layers_ << " layers, ";
  if (samples_) text << samples_ << " samples, ";
  text << "on:";
  for (int64_t kind = 0; kind < kKinds; ++kind)
    for (int64_t layer = 0; layer < layers_; ++layer)
      if (is_on(kind, layer)) text << ' ' << kNames[kind] << '.' << layer;
  text << (first_layer_ < 0 ? " nothing)" : ")");
  return text.str();
}

}  // namespace cegate
