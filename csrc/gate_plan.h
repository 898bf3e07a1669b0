// Gates compiled once into what the executors need: which sites run, on which samples, with which adapter, and where their
// weights lie. Plain C++: no torch, no Python.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace cegate {

constexpr int64_t kKinds = 3;  // spatial, semantic, frequency

class GatePlan {
 public:
  // gates: one [3, L] for a whole batch, or one a sample; 0 or 1. adapters: one index a sample, or empty: all use adapter 0.
  // weights: number of weights of a site of each kind. Throws std::invalid_argument with the value and where it is.
  GatePlan(
      const std::vector<std::vector<std::vector<int64_t>>>& gates, std::vector<int64_t> adapters,
      const std::array<int64_t, kKinds>& weights);

  int64_t layers() const { return layers_; }
  int64_t samples() const { return samples_; }          // 0: gates of a whole batch, of any size
  int64_t first_layer() const { return first_layer_; }  // -1: every gate is off
  int64_t last_layer() const { return last_layer_; }
  int64_t packed_weights() const { return packed_; }  // weights of one adapter, sites that are on only

  bool is_on(int64_t kind, int64_t layer) const { return offset(kind, layer) >= 0; }
  // First weight of a site in the packed weights of an adapter, kind by kind, layer by layer; -1 when off.
  int64_t offset(int64_t kind, int64_t layer) const;
  // One entry a sample: its adapter, or -1 where its gate is off. Empty: the site runs on the whole batch, no adapters
  // are named (a site that is off for a plan of a whole batch is empty too: ask is_on first).
  const std::vector<int64_t>& assignment(int64_t kind, int64_t layer) const;
  // Samples sorted by adapter, stable: in this order each adapter's samples are one packed product.
  std::vector<int64_t> order() const;
  std::string text() const;

 private:
  int64_t index(int64_t kind, int64_t layer) const;

  int64_t layers_, samples_, first_layer_ = -1, last_layer_ = -1, packed_ = 0;
  std::vector<int64_t> adapters_;
  std::vector<int64_t> offsets_;                    // [3 L]
  std::vector<std::vector<int64_t>> assignments_;  // [3 L]
};

}  // namespace cegate
