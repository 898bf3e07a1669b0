// Gates compiled once into what the executors need: which sites run, on which samples, with which adapter. Plain C++: no
// torch, no Python.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace cegate {

class DispatchPlan {
 public:
  // kinds: their names, for messages; one or more. gates: one [kinds, L] for a whole batch, or one a sample; 0 or 1.
  // adapters: one index a sample, or empty: all use adapter 0. Throws std::invalid_argument with the value and where it is.
  DispatchPlan(
      std::vector<std::string> kinds, const std::vector<std::vector<std::vector<int64_t>>>& gates,
      const std::vector<int64_t>& adapters);

  int64_t layers() const { return layers_; }
  int64_t samples() const { return samples_; }  // 0: gates of a whole batch, of any size
  bool is_on(int64_t kind, int64_t layer) const { return on_[index(kind, layer)]; }
  // One entry a sample: its adapter, or -1 where its gate is off. Empty: the site runs on the whole batch, no adapters
  // are named (a site that is off for a plan of a whole batch is empty too: ask is_on first).
  const std::vector<int64_t>& assignment(int64_t kind, int64_t layer) const { return assignments_[index(kind, layer)]; }
  std::string text() const;

 private:
  void check(const std::vector<std::vector<std::vector<int64_t>>>& gates, const std::vector<int64_t>& adapters) const;
  int64_t index(int64_t kind, int64_t layer) const;

  std::vector<std::string> kinds_;
  int64_t layers_ = 0, samples_ = 0;
  std::vector<bool> on_;                           // [kinds L]
  std::vector<std::vector<int64_t>> assignments_;  // [kinds L]
};

}  // namespace cegate
