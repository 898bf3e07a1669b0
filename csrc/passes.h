// What an operator does to the tokens of a batch, said once and run in one of two ways.
//
// Where there are tiles (float32 on AVX2 and AVX-512, bfloat16 on AVX512-BF16 without AMX): one parallel region over
// blocks of rows, every block through all steps before the next, the products in our own register tiles. All else: one
// step after the other over whole runs of samples, the products in ATen's BLAS.
//
// Why not the BLAS for all: these products are narrow (8 to 128 on one side), so packing and threading weigh as much as
// their arithmetic. And MKL, which torch ships, takes AVX2 on a processor that is not Intel's: in float32 104 GFLOP/s a
// core of an EPYC 9005 on which a tile alone reaches 265; in bfloat16 it reaches 370 to 450 through AVX512-BF16, so there
// the tiles gain where a call's own work weighs, at small sizes, and may cost a little at large ones. Where a processor
// has AMX, the BLAS multiplies bfloat16 through it: with our tiles modules at ViT-L size took two to four times as long.
// benchmarks/bench_dispatch.py shows every module beside its BLAS products alone. No result of ours depends on the number
// of threads: every element is summed over blocks of the depth in order.
#pragma once

#include <functional>

#include "tensors.h"
#include "tiles.h"

namespace cegate {

// The weight of an adapter, or the place for its gradient.
using WeightOf = std::function<Matrix(int64_t adapter)>;

// Of weights that lie one adapter behind the other, [rows, columns] or [A, rows, columns].
WeightOf weight_of(const Tensor& stacked, int64_t rows, int64_t columns);
WeightOf transposed(WeightOf weight);

// A factor of each adapter, or one of all.
class Factor {
 public:
  Factor(double value) : value_(static_cast<float>(value)) {}
  explicit Factor(std::vector<float> of_adapter) : value_(1), of_adapter_(std::move(of_adapter)) {}
  float of(int64_t adapter) const { return of_adapter_.empty() ? value_ : of_adapter_[adapter]; }

 private:
  float value_;
  std::vector<float> of_adapter_;
};

// A matrix with a row for every token of the batch, or a temporary one of a pass, which exists block by block.
class Rows {
 public:
  Rows(const Matrix& whole) : whole_(whole) {}

  Rows column_range(int64_t first, int64_t count) const {
    Rows result = *this;
    if (before_ < 0) result.whole_ = whole_.column_range(first, count);
    else result.shift_ += first, result.whole_.columns = count;
    return result;
  }
  int64_t columns() const { return whole_.columns; }

 private:
  friend class RowPass;
  friend struct Block;
  Rows(int64_t columns, int64_t before, ScalarType dtype) : whole_(nullptr, 0, columns, columns, dtype), before_(before) {}

  Matrix whole_;
  int64_t before_ = -1;  // columns of the temporary matrices in front of this one; -1: it is none
  int64_t shift_ = 0;    // columns of its own in front of those meant
};

// Neighbouring rows of samples that share an adapter.
struct Block {
  int64_t adapter, first, rows;

  Matrix of(const Rows& rows) const;

 private:
  friend class RowPass;
  friend class TokenSums;
  Block(int64_t adapter, int64_t first, int64_t rows, char* scratch, int64_t scratch_first, int64_t scratch_rows)
      : adapter(adapter), first(first), rows(rows), scratch_(scratch), scratch_first_(scratch_first),
        scratch_rows_(scratch_rows) {}

  char* scratch_;  // the temporary matrices, one behind the other
  int64_t scratch_first_, scratch_rows_;  // which rows of the batch they hold
};

// Steps that the rows of all samples go through.
class RowPass {
 public:
  // Blocks are whole multiples of `unit` rows (a grid row) from the first of a sample.
  RowPass(const std::vector<Run>& runs, int64_t tokens, ScalarType dtype, int64_t unit = 1);

  // A matrix of so many columns that nothing needs after the pass.
  Rows temporary(int64_t columns);

  struct Product {
    Rows out, a;
    WeightOf b;
    Factor alpha = 1.0;
    std::optional<Rows> base = {};
    WeightOf bias = {};  // [1, columns]
  };

  // out = base + alpha * (a b + bias). out may be base.
  void product(Product product) { steps_.push_back({std::move(product), {}}); }

  void loop(std::function<void(const Block&)> body) { steps_.push_back({{}, std::move(body)}); }

  // What rows get instead of the steps where the operator is off.
  void off(std::function<void(const Block&)> body) { off_ = std::move(body); }

  void run() const;

 private:
  struct Step {
    std::optional<Product> product;
    std::function<void(const Block&)> loop;
  };

  void run_tiles(const Tiles& set) const;
  void run_blas() const;
  void run_block(const Tiles& set, const Block& block) const;

  const std::vector<Run>& runs_;
  int64_t tokens_, unit_;
  ScalarType dtype_;
  int64_t scratch_columns_ = 0;
  std::vector<Step> steps_;
  std::function<void(const Block&)> off_;
};

// Sums over the tokens of each adapter: the gradients of weights. Adapters without a token get zeros.
class TokenSums {
 public:
  TokenSums(const std::vector<Run>& runs, int64_t tokens, ScalarType dtype, int64_t adapters)
      : runs_(runs), tokens_(tokens), adapters_(adapters), dtype_(dtype) {}

  // out = alpha * left^T right.
  void product(WeightOf out, const Rows& left, const Rows& right, Factor alpha = 1.0) {
    products_.push_back({std::move(out), left, right, std::move(alpha)});
  }

  // out [1, columns] = alpha * sum of the rows.
  void sum(WeightOf out, const Rows& rows, double alpha = 1.0) { sums_.push_back({std::move(out), rows, rows, alpha}); }

  void run() const;

 private:
  struct Sum {
    WeightOf out;
    Rows left, right;
    Factor alpha;

    bool is_turned() const { return left.columns() > right.columns(); }
    const Rows& narrow() const { return is_turned() ? right : left; }
    const Rows& wide() const { return is_turned() ? left : right; }
  };

  // Some rows (of the narrow factor) and columns (of the wide one) of a gradient; of a plain sum, `rows` of its columns.
  struct Task {
    const Sum* sum;
    int64_t adapter, row, rows, column, columns, work;
  };

  void run_tiles(const Tiles& set) const;
  void run_blas() const;
  std::vector<Task> split(const Tiles& set, const std::vector<int64_t>& tokens, int64_t columns_of_task) const;
  void sum_product(const Tiles& set, const Task& task, float* totals) const;
  void sum_columns(const Sum& sum, int64_t adapter, int64_t first, int64_t count) const;

  const std::vector<Run>& runs_;
  int64_t tokens_, adapters_;
  ScalarType dtype_;
  std::vector<Sum> products_, sums_;
};

}  // namespace cegate
