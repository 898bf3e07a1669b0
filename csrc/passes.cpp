#include "passes.h"

#include <atomic>

namespace cegate {
namespace {

constexpr int64_t kRowsOfBlock = 192;   // of a pass: its matrices stay in the second-level cache, its packing is little work
constexpr int64_t kRowsOfThread = 32;   // fewer would spend more on packing than a thread less costs
constexpr int64_t kRowsOfLoop = 64;     // that a loop takes at a time where it runs alone
constexpr int64_t kDepthOfSum = 128;    // tokens that a weight's gradient takes at a time: nearness of its narrow factor
constexpr int64_t kNarrow = 104;        // rows of a weight's gradient that a task sums
constexpr int64_t kMostNarrow = 128;    // the same in whole panels
constexpr int64_t kPanels = 16;         // and panels of columns, at most
constexpr int64_t kWorth = 1 << 19;     // multiplications that are worth waking a thread for

int64_t blocks_of(int64_t count, int64_t block) { return (count + block - 1) / block; }

int64_t grain_of(int64_t work) { return std::max<int64_t>(kWorth / std::max<int64_t>(work, 1), 1); }

char* element(const Matrix& m, int64_t row, int64_t column) {
  return m.data + (row * m.row_stride + column * m.column_stride) * bytes_of(m.dtype);
}

// Null where products are left to a BLAS.
const Tiles* tiles_of(ScalarType dtype) { return dtype == ScalarType::Float ? float32_tiles() : bfloat16_tiles(); }

// Memory of one parallel region: a part for every call of its body. From torch's allocator, where whoever measures sees it.
class Scratch {
 public:
  Scratch(int64_t parts, int64_t size, ScalarType dtype)
      : parts_(parts), bytes_(size * bytes_of(dtype)), memory_(empty({parts, size}, dtype)) {}

  char* take() {
    const int64_t part = taken_++;
    check(part < parts_, "cegate: a parallel region has more than ", parts_, " parts");
    return data_of(memory_) + part * bytes_;
  }

 private:
  int64_t parts_, bytes_;
  Tensor memory_;
  std::atomic<int64_t> taken_ = 0;
};

// Memory on the stack of a thread for a block of a factor, as `pack` writes it.
template <int64_t bytes>
struct alignas(64) Panel {
  char data[bytes];
};

// out = base + alpha * (a b + bias). b is packed piece by piece: panels of columns, some of the depth at a time.
void multiply_tiles(
    const Tiles& set, const Matrix& out, const Matrix* base, const Matrix& a, const Matrix& b, const char* bias, float alpha) {
  Panel<kMostPanelBytes> panel;
  Panel<kRowsOfBlock * kMostColumns * 4> sums;  // float32, whatever out is
  const int64_t pieces = std::max<int64_t>(blocks_of(a.columns, set.depth), 1);  // a depth of none still writes out
  for (int64_t row = 0; row < out.rows; row += kRowsOfBlock) {
    for (int64_t column = 0; column < out.columns; column += set.columns) {
      const int64_t columns = std::min(set.columns, out.columns - column);
      float* sum = reinterpret_cast<float*>(sums.data);
      for (int64_t k = 0; k < pieces; ++k) {
        const int64_t first = k * set.depth, depth = std::min(set.depth, a.columns - first);
        set.pack(panel.data, element(b, first, column), b.row_stride, b.column_stride, depth, columns);
        Tile tile{
            .a = element(a, row, first), .a_row = a.row_stride, .a_step = set.unit, .panel = panel.data, .depth = depth,
            .start = k ? sum : nullptr, .base = nullptr, .base_row = 0, .bias = nullptr, .out = sum,
            .out_row = set.columns, .rows = std::min(kRowsOfBlock, out.rows - row), .columns = columns, .alpha = 1};
        if (k + 1 < pieces) {
          set.add_up(tile);
          continue;
        }
        if (base) tile.base = element(*base, row, column), tile.base_row = base->row_stride;
        if (bias) tile.bias = bias + column * bytes_of(out.dtype);
        tile.out = element(out, row, column), tile.out_row = out.row_stride, tile.alpha = alpha;
        set.multiply(tile);
      }
    }
  }
}

Tensor view_of(const Matrix& m) {
  const int64_t sizes[] = {m.rows, m.columns}, strides[] = {m.row_stride, m.column_stride};
  return torch::stable::from_blob(
      m.data, torch::headeronly::IntHeaderOnlyArrayRef(sizes, 2), torch::headeronly::IntHeaderOnlyArrayRef(strides, 2),
      torch::stable::Device(torch::headeronly::DeviceType::CPU), m.dtype);
}

// out = base + alpha * a b.
void multiply_blas(const Matrix& out, const Matrix* base, const Matrix& a, const Matrix& b, float alpha) {
  if (out.rows == 0 || out.columns == 0) return;
  // MKL takes the terms of a bfloat16 product in pairs: an odd row's neighbour is multiplied by zero, which keeps a NaN
  const bool reads_on = a.dtype == ScalarType::BFloat16 && a.columns % 2 && a.row_stride != a.columns;
  const Tensor target = view_of(out), right = view_of(b);
  const Tensor left = reads_on ? torch::stable::contiguous(view_of(a)) : view_of(a);
  if (alpha == 1 && !base) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(target.get(), left.get(), right.get()));
    return;
  }
  const Tensor start = view_of(base ? *base : out);
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(target.get(), start.get(), left.get(), right.get(), base ? 1.0 : 0.0, alpha));
}

}  // namespace

WeightOf weight_of(const Tensor& stacked, int64_t rows, int64_t columns) {
  const Matrix first = matrix_of(stacked, rows, columns);
  return [first](int64_t adapter) { return first.row_range(adapter * first.rows, first.rows); };
}

WeightOf transposed(WeightOf weight) {
  return [weight = std::move(weight)](int64_t adapter) { return weight(adapter).transposed(); };
}

Matrix Block::of(const Rows& wanted) const {
  if (wanted.before_ < 0) return wanted.whole_.row_range(first, rows);
  const int64_t stride = wanted.whole_.row_stride;
  const int64_t offset = wanted.before_ * scratch_rows_ + (first - scratch_first_) * stride + wanted.shift_;
  return Matrix(
      scratch_ + offset * bytes_of(wanted.whole_.dtype), rows, wanted.whole_.columns, stride, wanted.whole_.dtype);
}

RowPass::RowPass(const std::vector<Run>& runs, int64_t tokens, ScalarType dtype, int64_t unit)
    : runs_(runs), tokens_(tokens), unit_(std::max<int64_t>(unit, 1)), dtype_(dtype) {}

Rows RowPass::temporary(int64_t columns) {
  const Rows result(columns, scratch_columns_, dtype_);
  scratch_columns_ += columns;
  return result;
}

void RowPass::run() const {
  if (const Tiles* set = tiles_of(dtype_)) run_tiles(*set);
  else run_blas();
}

void RowPass::run_tiles(const Tiles& set) const {
  int64_t work_of_row = 0;
  for (const Step& step : steps_)
    if (step.product) work_of_row += step.product->a.columns() * step.product->out.columns();
  // whole tiles where rows do not belong together
  const int64_t unit = unit_ > 1 ? unit_ : set.rows;
  int64_t units = 0;
  std::vector<int64_t> first_unit;
  for (const Run& run : runs_) first_unit.push_back(units), units += blocks_of(run.count * tokens_, unit);
  const int64_t grain = std::max(grain_of(work_of_row * unit), blocks_of(kRowsOfThread, unit));
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), blocks_of(units, grain));
  // blocks of even height, as few as a thread's share needs
  const int64_t share = blocks_of(units, std::max<int64_t>(threads, 1)), most = std::max<int64_t>(kRowsOfBlock / unit, 1);
  const int64_t capacity = std::max<int64_t>(blocks_of(share, std::max<int64_t>(blocks_of(share, most), 1)), 1) * unit;
  Scratch scratch(threads, scratch_columns_ * capacity, dtype_);
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    char* temporaries = scratch.take();
    for (size_t r = 0; r < runs_.size(); ++r) {
      const Run& run = runs_[r];
      const int64_t from = std::max(begin - first_unit[r], int64_t{0}) * unit;
      const int64_t to = std::min((end - first_unit[r]) * unit, run.count * tokens_);
      for (int64_t row = from; row < to; row += capacity) {
        const int64_t first = run.first * tokens_ + row;
        const Block block(run.adapter, first, std::min(capacity, to - row), temporaries, first, capacity);
        if (run.adapter >= 0) run_block(set, block);
        else if (off_) off_(block);
      }
    }
  });
}

void RowPass::run_block(const Tiles& set, const Block& block) const {
  for (const Step& step : steps_) {
    if (!step.product) {
      step.loop(block);
      continue;
    }
    const Product& product = *step.product;
    const Matrix out = block.of(product.out), base = product.base ? block.of(*product.base) : out;
    const char* bias = product.bias ? product.bias(block.adapter).data : nullptr;
    multiply_tiles(
        set, out, product.base ? &base : nullptr, block.of(product.a), product.b(block.adapter), bias,
        product.alpha.of(block.adapter));
  }
}

void RowPass::run_blas() const {
  const TypedLoops& typed = loops_of(dtype_);
  const int64_t rows_of_loop = std::max<int64_t>(kRowsOfLoop / unit_, 1) * unit_;
  const Tensor temporaries = empty({longest(runs_) * tokens_ * scratch_columns_}, dtype_);
  for (const Run& run : runs_) {
    const int64_t first = run.first * tokens_, rows = run.count * tokens_;
    auto block_of = [&](int64_t from, int64_t count) {
      return Block(run.adapter, first + from, count, data_of(temporaries), first, longest(runs_) * tokens_);
    };
    auto loop = [&](const std::function<void(const Block&)>& body) {
      torch::stable::parallel_for(0, blocks_of(rows, rows_of_loop), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          body(block_of(i * rows_of_loop, std::min(rows_of_loop, rows - i * rows_of_loop)));
      });
    };
    if (run.adapter < 0) {
      if (off_) loop(off_);
      continue;
    }
    const Block whole = block_of(0, rows);
    for (const Step& step : steps_) {
      if (!step.product) {
        loop(step.loop);
        continue;
      }
      const Product& product = *step.product;
      const Matrix out = whole.of(product.out);
      const Matrix base = product.base ? whole.of(*product.base) : out;
      const float alpha = product.alpha.of(run.adapter);
      if (product.bias) {
        const char* bias = product.bias(run.adapter).data;
        loop([&](const Block& block) {
          const Matrix target = block.of(product.out);
          const Matrix start = product.base ? block.of(*product.base) : target;
          typed.add_bias(
              target.data, target.row_stride, product.base ? start.data : nullptr, start.row_stride, bias, alpha,
              block.rows, target.columns);
        });
      }
      const bool adds = product.base || product.bias;
      multiply_blas(out, adds ? (product.bias ? &out : &base) : nullptr, whole.of(product.a), product.b(run.adapter), alpha);
    }
  }
}

void TokenSums::run() const {
  if (const Tiles* set = tiles_of(dtype_)) run_tiles(*set);
  else run_blas();
}

void TokenSums::run_tiles(const Tiles& set) const {
  // columns in as few tasks as keep the threads busy: then the wide factor is read row by row
  std::vector<int64_t> tokens(adapters_, 0);
  for (const Run& run : runs_)
    if (run.adapter >= 0) tokens[run.adapter] += run.count * tokens_;
  int64_t panels = 0, work = 0;
  for (const Sum& sum : products_) {
    for (const int64_t count : tokens) {
      if (count) panels += blocks_of(sum.wide().columns(), set.columns);
      work += count * sum.left.columns() * sum.right.columns();
    }
  }
  const int64_t threads = work < kWorth ? 1 : torch::stable::get_num_threads();
  const int64_t panels_of_task = std::clamp<int64_t>(panels / (2 * threads), 1, kPanels);
  std::vector<Task> tasks = split(set, tokens, panels_of_task * set.columns);
  // the largest first, each to the thread that has least
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.work > b.work; });
  std::vector<std::vector<const Task*>> shares(threads);
  std::vector<int64_t> loads(threads, 0);
  for (const Task& task : tasks) {
    const auto least = std::min_element(loads.begin(), loads.end());
    shares[least - loads.begin()].push_back(&task), *least += task.work;
  }
  int64_t most_rows = 0;
  for (const Task& task : tasks) most_rows = std::max(most_rows, task.columns ? task.rows : 0);
  Scratch scratch(threads, most_rows * panels_of_task * set.columns, ScalarType::Float);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    float* totals = reinterpret_cast<float*>(scratch.take());
    for (int64_t share = begin; share < end; ++share) {
      for (const Task* task : shares[share]) {
        if (task->columns) sum_product(set, *task, totals);
        else sum_columns(*task->sum, task->adapter, task->row, task->rows);
      }
    }
  });
}

std::vector<TokenSums::Task> TokenSums::split(
    const Tiles& set, const std::vector<int64_t>& tokens, int64_t columns_of_task) const {
  std::vector<Task> tasks;
  for (int64_t adapter = 0; adapter < adapters_; ++adapter) {
    for (const Sum& sum : products_) {
      const int64_t narrow = sum.narrow().columns(), wide = sum.wide().columns();
      const int64_t chunks = std::max<int64_t>(blocks_of(narrow, kNarrow), 1), unit = set.rows;
      const int64_t rows_of_task = blocks_of(blocks_of(narrow, chunks), unit) * unit;
      for (int64_t column = 0; column < wide; column += columns_of_task) {
        for (int64_t row = 0; row < narrow; row += rows_of_task) {
          const int64_t rows = std::min(rows_of_task, narrow - row), columns = std::min(columns_of_task, wide - column);
          tasks.push_back({&sum, adapter, row, rows, column, columns, tokens[adapter] * rows * columns});
        }
      }
    }
    for (const Sum& sum : sums_) {
      for (int64_t column = 0; column < sum.left.columns(); column += kRowsOfLoop) {
        const int64_t columns = std::min(kRowsOfLoop, sum.left.columns() - column);
        tasks.push_back({&sum, adapter, column, columns, 0, 0, tokens[adapter] * columns});
      }
    }
  }
  return tasks;
}

// All tokens of an adapter, kDepthOfSum at a time, into totals of the task's own.
void TokenSums::sum_product(const Tiles& set, const Task& task, float* totals) const {
  const Sum& sum = *task.sum;
  Panel<kDepthOfSum * kMostNarrow * 2> packed;
  Panel<kDepthOfSum * kMostColumns * 4> right;
  const int64_t size = task.rows * set.columns;  // of a panel's totals
  const int64_t left_stride = kDepthOfSum * bytes_of(dtype_);
  std::fill(totals, totals + blocks_of(task.columns, set.columns) * size, 0.0f);
  for (const Run& run : runs_) {
    if (run.adapter != task.adapter) continue;
    for (int64_t row = run.first * tokens_, last = row + run.count * tokens_; row < last; row += kDepthOfSum) {
      const Block block(run.adapter, row, std::min(kDepthOfSum, last - row), nullptr, 0, 0);
      const Matrix a = block.of(sum.narrow()), b = block.of(sum.wide());
      const char* left = element(a, 0, task.row);
      // words of several rows of a do not lie side by side
      if (set.unit > 1) {
        for (int64_t i = 0; i < task.rows; i += set.columns) {
          set.pack(
              packed.data + i * left_stride, left + i * bytes_of(dtype_), a.row_stride, 1, block.rows,
              std::min(set.columns, task.rows - i));
        }
      }
      for (int64_t j = 0; j < task.columns; j += set.columns) {
        const int64_t columns = std::min(set.columns, task.columns - j);
        float* total = totals + j / set.columns * size;
        set.pack(right.data, element(b, 0, task.column + j), b.row_stride, 1, block.rows, columns);
        Tile tile{
            .a = left, .a_row = 1, .a_step = a.row_stride, .panel = right.data, .depth = block.rows,
            .start = nullptr, .base = total,
            .base_row = set.columns, .bias = nullptr, .out = total, .out_row = set.columns, .rows = task.rows,
            .columns = columns, .alpha = 1};
        if (set.unit == 1) {
          set.add_up(tile);
          continue;
        }
        tile.a_row = set.unit, tile.a_step = set.unit * set.columns;
        for (int64_t i = 0; i < task.rows; i += set.columns) {
          tile.a = packed.data + i * left_stride, tile.base = tile.out = total + i * set.columns;
          tile.rows = std::min(set.columns, task.rows - i);
          set.add_up(tile);
        }
      }
    }
  }
  const Matrix weight = sum.out(task.adapter), out = sum.is_turned() ? weight.transposed() : weight;
  for (int64_t j = 0; j < task.columns; j += set.columns) {
    set.place(
        element(out, task.row, task.column + j), out.row_stride, out.column_stride, totals + j / set.columns * size,
        task.rows, std::min(set.columns, task.columns - j), sum.alpha.of(task.adapter));
  }
}

void TokenSums::run_blas() const {
  std::vector<bool> seen(adapters_, false);
  for (const Run& run : runs_) {
    if (run.adapter < 0 || run.count * tokens_ == 0) continue;
    const Block block(run.adapter, run.first * tokens_, run.count * tokens_, nullptr, 0, 0);
    for (const Sum& sum : products_) {
      const Matrix out = sum.out(run.adapter);
      multiply_blas(
          out, seen[run.adapter] ? &out : nullptr, block.of(sum.left).transposed(), block.of(sum.right),
          sum.alpha.of(run.adapter));
    }
    seen[run.adapter] = true;
  }
  for (int64_t adapter = 0; adapter < adapters_; ++adapter) {
    for (const Sum& sum : products_) {
      const Matrix out = sum.out(adapter);
      if (!seen[adapter]) std::fill(out.data, out.data + out.rows * out.columns * bytes_of(dtype_), 0);
    }
    for (const Sum& sum : sums_) {
      torch::stable::parallel_for(0, blocks_of(sum.left.columns(), kRowsOfLoop), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t first = i * kRowsOfLoop;
          sum_columns(sum, adapter, first, std::min(kRowsOfLoop, sum.left.columns() - first));
        }
      });
    }
  }
}

// In float32 over kRowsOfLoop rows, beyond that in float64.
void TokenSums::sum_columns(const Sum& sum, int64_t adapter, int64_t first, int64_t count) const {
  const TypedLoops& typed = loops_of(dtype_);
  double total[kRowsOfLoop] = {};
  float part[kRowsOfLoop];
  for (const Run& run : runs_) {
    if (run.adapter != adapter) continue;
    for (int64_t row = run.first * tokens_, last = row + run.count * tokens_; row < last; row += kRowsOfLoop) {
      const Matrix rows = Block(adapter, row, std::min(kRowsOfLoop, last - row), nullptr, 0, 0).of(sum.left);
      std::fill(part, part + count, 0.0f);
      typed.sum_rows(rows.column_range(first, count).data, rows.row_stride, rows.rows, count, part);
      for (int64_t c = 0; c < count; ++c) total[c] += part[c];
    }
  }
  for (int64_t c = 0; c < count; ++c) part[c] = static_cast<float>(sum.alpha.of(adapter) * total[c]);
  typed.store(sum.out(adapter).column_range(first, count).data, count, 1, count, part, count);
}

}  // namespace cegate
