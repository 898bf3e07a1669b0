#include "dispatch_plan.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

namespace cegate {
namespace {

template <typename Error = std::invalid_argument, typename... Parts>
void require(bool good, const Parts&... parts) {
  if (good) return;
  std::ostringstream message;
  message << "DispatchPlan: ";
  (message << ... << parts);
  throw Error(message.str());
}

}  // namespace

DispatchPlan::DispatchPlan(
    std::vector<std::string> kinds, const std::vector<std::vector<std::vector<int64_t>>>& gates,
    const std::vector<int64_t>& adapters)
    : kinds_(std::move(kinds)) {
  require(!gates.empty() && !kinds_.empty(), "gates is empty, expected [kinds, L] or [B, kinds, L]");
  layers_ = gates[0].empty() ? 0 : static_cast<int64_t>(gates[0][0].size());
  check(gates, adapters);
  const size_t rows = gates.size();
  samples_ = static_cast<int64_t>(std::max(adapters.size(), rows == 1 ? 0 : rows));

  const size_t sites = kinds_.size() * layers_;
  on_.resize(sites), assignments_.resize(sites);
  for (size_t site = 0; site < sites; ++site) {
    const size_t kind = site / layers_, layer = site % layers_;
    auto& assignment = assignments_[site];
    for (size_t row = 0; row < rows; ++row) on_[site] = on_[site] || gates[row][kind][layer];
    for (int64_t b = 0; b < samples_; ++b) {
      const bool on = gates[rows == 1 ? 0 : b][kind][layer];
      assignment.push_back(on ? (adapters.empty() ? 0 : adapters[b]) : -1);
    }
    // every sample, and one set of weights: the whole batch, no dispatch at all
    if (adapters.empty() && std::count(assignment.begin(), assignment.end(), 0) == samples_) assignment.clear();
  }
}

void DispatchPlan::check(
    const std::vector<std::vector<std::vector<int64_t>>>& gates, const std::vector<int64_t>& adapters) const {
  for (size_t b = 0; b < gates.size(); ++b) {
    require(gates[b].size() == kinds_.size(), "gates[", b, "] has ", gates[b].size(), " rows for ", kinds_.size(), " kinds");
    for (size_t kind = 0; kind < kinds_.size(); ++kind) {
      const auto& row = gates[b][kind];
      require(
          static_cast<int64_t>(row.size()) == layers_, "gates[", b, "][", kind, "] has ", row.size(),
          " layers, the first row has ", layers_);
      for (size_t layer = 0; layer < row.size(); ++layer)
        require(
            row[layer] == 0 || row[layer] == 1, "gate ", kinds_[kind], ".", layer, " of sample ", b, " is ", row[layer],
            ", accepted are 0 and 1");
    }
  }
  require(
      gates.size() == 1 || adapters.empty() || adapters.size() == gates.size(), "adapters has ", adapters.size(),
      " entries for gates of ", gates.size(), " samples");
  for (size_t b = 0; b < adapters.size(); ++b)
    require(adapters[b] >= 0, "adapters[", b, "] is ", adapters[b], ", accepted are 0 and more");
}

int64_t DispatchPlan::index(int64_t kind, int64_t layer) const {
  const int64_t kinds = static_cast<int64_t>(kinds_.size());
  require<std::out_of_range>(
      kind >= 0 && kind < kinds && layer >= 0 && layer < layers_, "kind ", kind, ", layer ", layer, " is outside 0..",
      kinds - 1, ", 0..", layers_ - 1);
  return kind * layers_ + layer;
}

std::string DispatchPlan::text() const {
  std::ostringstream text;
  text << "DispatchPlan(" << layers_ << " layers, ";
  if (samples_) text << samples_ << " samples, ";
  text << "on:";
  for (size_t site = 0; site < on_.size(); ++site)
    if (on_[site]) text << ' ' << kinds_[site / layers_] << '.' << site % layers_;
  text << (std::find(on_.begin(), on_.end(), true) == on_.end() ? " nothing)" : ")");
  return text.str();
}

}  // namespace cegate
