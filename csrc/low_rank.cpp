#include "low_rank.h"

#include <cstring>

#include "products.h"

namespace cegate {
namespace {

constexpr int64_t kRowsPerTask = 64;  // fixed, so that no sum depends on the number of threads

int64_t tasks_of(int64_t rows) { return (rows + kRowsPerTask - 1) / kRowsPerTask; }

int64_t task_rows(int64_t task, int64_t rows) { return std::min(kRowsPerTask, rows - task * kRowsPerTask); }

// Runs body(first_row, rows, task) for every fixed block of rows on torch's thread pool.
template <typename Body>
void for_row_blocks(int64_t rows, const Body& body) {
  torch::stable::parallel_for(0, tasks_of(rows), 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(task * kRowsPerTask, task_rows(task, rows), task);
  });
}

// target [1, width] = scale * sum of the tasks' partial sums, on top of what it holds if `add`.
void write_sums(const std::vector<float>& partial, const Matrix& target, float scale, bool add) {
  const TypedLoops& typed = loops_of(target.dtype);
  const int64_t width = target.columns;
  std::vector<double> total(width, 0.0);
  for (size_t i = 0; i < partial.size(); ++i) total[i % width] += partial[i];
  std::vector<float> result(width, 0.0f);
  if (add) typed.load(target.data, width, 1, width, result.data(), width);
  for (int64_t c = 0; c < width; ++c) result[c] += static_cast<float>(scale * total[c]);
  typed.store(target.data, width, 1, width, result.data(), width);
}

void sum_rows(const Matrix& source, const Matrix& target, float scale, bool add) {
  const TypedLoops& typed = loops_of(source.dtype);
  const int64_t size = bytes_of(source.dtype);
  std::vector<float> partial(tasks_of(source.rows) * source.columns, 0.0f);
  for_row_blocks(source.rows, [&](int64_t first, int64_t rows, int64_t task) {
    typed.sum_rows(
        source.data + first * source.row_stride * size, source.row_stride, rows, source.columns,
        partial.data() + task * source.columns);
  });
  write_sums(partial, target, scale, add);
}

void clear(const Tensor& tensor) {
  if (tensor.numel()) std::memset(data_of(tensor), 0, tensor.numel() * bytes_of(tensor.scalar_type()));
}

// The weights of adapter `a` in a contiguous tensor [rows, columns] or [A, rows, columns].
Matrix weight_of(const Tensor& stacked, int64_t a, int64_t rows, int64_t columns) {
  const ScalarType dtype = stacked.scalar_type();
  return Matrix(data_of(stacked) + a * rows * columns * bytes_of(dtype), rows, columns, columns, dtype);
}

struct Shape {
  int64_t samples, tokens, channels, rank, out, stacked;
  ScalarType dtype;
  Activation activation;
};

Activation activation_of(const char* op, int64_t code) {
  check(code >= 0 && code <= 2, op, ": activation is ", code, ", accepted are 0 (none), 1 (relu), 2 (gelu)");
  return static_cast<Activation>(code);
}

// A weight is [shape...] or [A, shape...]; all of one call agree.
void check_weight(
    const char* op, const char* name, const Tensor& weight, const Shape& shape, bool stacked,
    std::vector<int64_t> expected) {
  if (stacked) expected.insert(expected.begin(), shape.stacked);
  check_tensor(op, name, weight, shape.dtype, expected);
}

Shape check_shapes(const char* op, const Tensor& x, const Tensor& down, const Tensor& up, const std::vector<int64_t>& adapters) {
  const ScalarType dtype = check_dtype(op, "x", x);
  check(x.dim() == 3, op, ": x has shape ", shape_of(x), ", expected [B, T, C]");
  check(down.dim() == 2 || down.dim() == 3, op, ": down has shape ", shape_of(down), ", expected [r, C] or [A, r, C]");
  const bool stacked = down.dim() == 3;
  check(up.dim() == down.dim(), op, ": up has shape ", shape_of(up), ", down has ", shape_of(down));
  Shape shape{x.size(0), x.size(1), x.size(2), down.size(down.dim() - 2), up.size(up.dim() - 2),
              stacked ? down.size(0) : 1, dtype, Activation::none};
  check(
      !stacked || !adapters.empty() || shape.samples == 0, op, ": stacked weights of ", shape.stacked,
      " adapters need one adapter index a sample");
  check_weight(op, "down", down, shape, stacked, {shape.rank, shape.channels});
  check_weight(op, "up", up, shape, stacked, {shape.out, shape.rank});
  return shape;
}

}  // namespace

std::tuple<Tensor, Tensor> low_rank(
    Tensor x, Tensor down, Tensor up, std::optional<Tensor> base, std::optional<Tensor> down_bias,
    std::optional<Tensor> up_bias, int64_t activation, double scale, std::vector<int64_t> adapters) {
  const char* op = "low_rank";
  Shape shape = check_shapes(op, x, down, up, adapters);
  shape.activation = activation_of(op, activation);
  const bool stacked = down.dim() == 3;
  const auto runs = runs_of(op, adapters, shape.samples, shape.stacked);
  if (base) check_tensor(op, "base", *base, shape.dtype, {shape.samples, shape.tokens, shape.out});
  if (down_bias) {
    check_weight(op, "down_bias", *down_bias, shape, stacked, {shape.rank});
    down_bias = dense(*down_bias);
  }
  if (up_bias) {
    check_weight(op, "up_bias", *up_bias, shape, stacked, {shape.out});
    up_bias = dense(*up_bias);
  }
  x = dense(x), down = dense(down), up = dense(up);
  // a part of a fused qkv output needs no copy: its rows are evenly spaced
  const bool even = base && (shape.out == 1 || base->stride(2) == 1) &&
                    (shape.samples == 1 || shape.tokens == 1 || base->stride(0) == shape.tokens * base->stride(1));
  if (base && !even) base = dense(*base);

  const TypedLoops& typed = loops_of(shape.dtype);
  const int64_t size = bytes_of(shape.dtype), rows_all = shape.samples * shape.tokens;
  Tensor y = empty({shape.samples, shape.tokens, shape.out}, shape.dtype);
  Tensor pre = empty({shape.samples, shape.tokens, shape.rank}, shape.dtype);
  const bool keeps_pre = shape.activation != Activation::none;
  Tensor hidden = keeps_pre ? empty({longest(runs), shape.tokens, shape.rank}, shape.dtype) : pre;
  const Matrix all_y = matrix_of(y, rows_all, shape.out), all_x = matrix_of(x, rows_all, shape.channels);
  const Matrix all_pre = matrix_of(pre, rows_all, shape.rank);
  // the stride of an axis of one element means nothing
  const int64_t base_stride = !base ? 0 : shape.tokens > 1 ? base->stride(1) : base->stride(0);

  for (const Run& run : runs) {
    const int64_t first = run.first * shape.tokens, count = run.count * shape.tokens;
    const bool on = run.adapter >= 0;
    const char* bias = on && up_bias ? data_of(*up_bias) + run.adapter * shape.out * size : nullptr;
    const char* from = base ? data_of(*base) + first * base_stride * size : nullptr;
    const Matrix part_y = all_y.row_range(first, count), part_pre = all_pre.row_range(first, count);
    const bool prefill = bias || !on || (from && base_stride != shape.out);
    if (prefill) {
      for_row_blocks(count, [&](int64_t row, int64_t rows, int64_t) {
        typed.add_bias(
            part_y.data + row * shape.out * size, shape.out, from ? from + row * base_stride * size : nullptr,
            base_stride, bias, static_cast<float>(scale), rows, shape.out);
      });
    }
    if (!on) {
      if (count) std::memset(part_pre.data, 0, count * shape.rank * size);
      continue;
    }
    const Matrix weight_down = weight_of(down, run.adapter, shape.rank, shape.channels);
    const Matrix weight_up = weight_of(up, run.adapter, shape.out, shape.rank);
    multiply(part_pre, all_x.row_range(first, count), weight_down.transposed());
    const Matrix part_hidden = keeps_pre ? matrix_of(hidden, count, shape.rank) : part_pre;
    const char* narrow_bias = down_bias ? data_of(*down_bias) + run.adapter * shape.rank * size : nullptr;
    if (narrow_bias || keeps_pre) {
      for_row_blocks(count, [&](int64_t row, int64_t rows, int64_t) {
        const int64_t offset = row * shape.rank * size;
        typed.activate(
            part_pre.data + offset, part_hidden.data + offset, narrow_bias, shape.activation, rows, shape.rank);
      });
    }
    if (prefill || !from) {
      multiply(part_y, part_hidden, weight_up.transposed(), scale, prefill ? 1 : 0);
    } else {
      const Matrix part_base(const_cast<char*>(from), count, shape.out, base_stride, shape.dtype);
      multiply_add(part_y, part_base, part_hidden, weight_up.transposed(), scale);
    }
  }
  return {y, pre};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> low_rank_backward(
    Tensor dy, Tensor x, Tensor pre, Tensor down, Tensor up, bool down_bias, bool up_bias, int64_t activation,
    double scale, std::vector<int64_t> adapters, bool wants_x, bool wants_weights) {
  const char* op = "low_rank_backward";
  Shape shape = check_shapes(op, x, down, up, adapters);
  shape.activation = activation_of(op, activation);
  const auto runs = runs_of(op, adapters, shape.samples, shape.stacked);
  check_tensor(op, "dy", dy, shape.dtype, {shape.samples, shape.tokens, shape.out});
  check_tensor(op, "pre", pre, shape.dtype, {shape.samples, shape.tokens, shape.rank});
  dy = dense(dy), x = dense(x), pre = dense(pre), down = dense(down), up = dense(up);

  const TypedLoops& typed = loops_of(shape.dtype);
  const int64_t size = bytes_of(shape.dtype), rows_all = shape.samples * shape.tokens;
  // an adapter may come in several runs, or in none
  const bool adds = !adapters.empty();
  auto gradient_of = [&](bool wanted, std::vector<int64_t> sizes) {
    if (!wanted || !wants_weights) return nothing(shape.dtype);
    if (down.dim() == 3) sizes.insert(sizes.begin(), shape.stacked);
    const Tensor gradient = empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), shape.dtype);
    if (adds || rows_all == 0) clear(gradient);
    return gradient;
  };
  const double beta = adds ? 1 : 0;
  Tensor dup = gradient_of(true, {shape.out, shape.rank}), dhidden = empty_as(pre);
  Tensor ddown_bias = gradient_of(down_bias, {shape.rank}), dup_bias = gradient_of(up_bias, {shape.out});
  const Matrix all_dhidden = matrix_of(dhidden, rows_all, shape.rank), all_pre = matrix_of(pre, rows_all, shape.rank);

  {
    // gone before dx and ddown are made
    const bool recomputes = wants_weights && shape.activation != Activation::none;
    const Tensor hidden = recomputes ? empty({longest(runs), shape.tokens, shape.rank}, shape.dtype) : pre;
    for (const Run& run : runs) {
      if (run.adapter < 0) continue;
      const int64_t first = run.first * shape.tokens, count = run.count * shape.tokens;
      const Matrix part_dy = matrix_of(dy, rows_all, shape.out).row_range(first, count);
      const Matrix part_dhidden = all_dhidden.row_range(first, count), part_pre = all_pre.row_range(first, count);
      const Matrix part_hidden = recomputes ? matrix_of(hidden, count, shape.rank) : part_pre;
      multiply(part_dhidden, part_dy, weight_of(up, run.adapter, shape.out, shape.rank));
      std::vector<float> sums(wants_weights && down_bias ? tasks_of(count) * shape.rank : 0, 0.0f);
      for_row_blocks(count, [&](int64_t row, int64_t rows, int64_t task) {
        const int64_t offset = row * shape.rank * size;
        typed.deactivate(
            part_dhidden.data + offset, part_pre.data + offset, recomputes ? part_hidden.data + offset : nullptr,
            shape.activation, static_cast<float>(scale), rows, shape.rank,
            sums.empty() ? nullptr : sums.data() + task * shape.rank);
      });
      if (!wants_weights || count == 0) continue;
      multiply(weight_of(dup, run.adapter, shape.out, shape.rank), part_dy.transposed(), part_hidden, scale, beta);
      if (down_bias) write_sums(sums, weight_of(ddown_bias, run.adapter, 1, shape.rank), 1.0f, adds);
      if (up_bias) sum_rows(part_dy, weight_of(dup_bias, run.adapter, 1, shape.out), static_cast<float>(scale), adds);
    }
  }

  Tensor dx = wants_x ? empty_as(x) : nothing(shape.dtype), ddown = gradient_of(true, {shape.rank, shape.channels});
  for (const Run& run : runs) {
    const int64_t first = run.first * shape.tokens, count = run.count * shape.tokens;
    const Matrix part_dx = matrix_of(dx, rows_all, shape.channels).row_range(first, count);
    if (run.adapter < 0) {
      if (wants_x && count) std::memset(part_dx.data, 0, count * shape.channels * size);
      continue;
    }
    const Matrix part_dhidden = all_dhidden.row_range(first, count);
    const Matrix part_x = matrix_of(x, rows_all, shape.channels).row_range(first, count);
    if (wants_x) multiply(part_dx, part_dhidden, weight_of(down, run.adapter, shape.rank, shape.channels));
    if (!wants_weights || count == 0) continue;
    multiply(weight_of(ddown, run.adapter, shape.rank, shape.channels), part_dhidden.transposed(), part_x, 1, beta);
  }
  return {dx, ddown, dup, ddown_bias, dup_bias};
}

namespace {

// Both halves of a LoRA on q and v: weights of each, and where their rows lie in the narrow hidden tensor.
struct QueryValue {
  Shape shape;
  bool stacked;

  QueryValue(
      const char* op, const Tensor& x, const Tensor& down_q, const Tensor& up_q, const Tensor& down_v,
      const Tensor& up_v, const std::vector<int64_t>& adapters)
      : shape(check_shapes(op, x, down_q, up_q, adapters)), stacked(down_q.dim() == 3) {
    check_weight(op, "down_v", down_v, shape, stacked, {shape.rank, shape.channels});
    check_weight(op, "up_v", up_v, shape, stacked, {shape.out, shape.rank});
  }
};

}  // namespace

Tensor low_rank_qv_(
    Tensor qkv, Tensor x, Tensor down_q, Tensor up_q, Tensor down_v, Tensor up_v, double scale,
    std::vector<int64_t> adapters, bool keeps) {
  const char* op = "low_rank_qv_";
  const QueryValue both(op, x, down_q, up_q, down_v, up_v, adapters);
  const Shape& shape = both.shape;
  check_tensor(op, "qkv", qkv, shape.dtype, {shape.samples, shape.tokens, 3 * shape.out});
  check(qkv.is_contiguous(), op, ": qkv is changed in place and must be contiguous");
  const auto runs = runs_of(op, adapters, shape.samples, shape.stacked);
  x = dense(x), down_q = dense(down_q), up_q = dense(up_q);
  down_v = dense(down_v), up_v = dense(up_v);

  const int64_t rows_all = shape.samples * shape.tokens;
  Tensor hidden = empty({keeps ? shape.samples : longest(runs), shape.tokens, 2 * shape.rank}, shape.dtype);
  if (!adapters.empty() && keeps) clear(hidden);
  for (const Run& run : runs) {
    if (run.adapter < 0) continue;
    const int64_t first = run.first * shape.tokens, count = run.count * shape.tokens;
    const Matrix narrow = matrix_of(hidden, keeps ? rows_all : count, 2 * shape.rank).row_range(keeps ? first : 0, count);
    const Matrix target = matrix_of(qkv, rows_all, 3 * shape.out).row_range(first, count);
    const Matrix part_x = matrix_of(x, rows_all, shape.channels).row_range(first, count);
    const std::pair<const Tensor*, const Tensor*> halves[] = {{&down_q, &up_q}, {&down_v, &up_v}};
    auto hidden_half = [&](int64_t half) { return narrow.column_range(half * shape.rank, shape.rank); };
    for (int64_t half = 0; half < 2; ++half) {  // x may be qkv itself: it is read before that changes
      const Matrix down = weight_of(*halves[half].first, run.adapter, shape.rank, shape.channels);
      multiply(hidden_half(half), part_x, down.transposed());
    }
    for (int64_t half = 0; half < 2; ++half) {
      const Matrix up = weight_of(*halves[half].second, run.adapter, shape.out, shape.rank);
      multiply(target.column_range(2 * half * shape.out, shape.out), hidden_half(half), up.transposed(), scale, 1);
    }
  }
  return keeps ? hidden : empty({0}, shape.dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> low_rank_qv_backward(
    Tensor dqkv, Tensor x, Tensor hidden, Tensor down_q, Tensor up_q, Tensor down_v, Tensor up_v, double scale,
    std::vector<int64_t> adapters, bool wants_x, bool wants_weights) {
  const char* op = "low_rank_qv_backward";
  const QueryValue both(op, x, down_q, up_q, down_v, up_v, adapters);
  const Shape& shape = both.shape;
  check_tensor(op, "dqkv", dqkv, shape.dtype, {shape.samples, shape.tokens, 3 * shape.out});
  check_tensor(op, "hidden", hidden, shape.dtype, {shape.samples, shape.tokens, 2 * shape.rank});
  const auto runs = runs_of(op, adapters, shape.samples, shape.stacked);
  dqkv = dense(dqkv), x = dense(x), hidden = dense(hidden), down_q = dense(down_q);
  up_q = dense(up_q), down_v = dense(down_v), up_v = dense(up_v);

  const int64_t size = bytes_of(shape.dtype), rows_all = shape.samples * shape.tokens;
  auto gradient_of = [&](const Tensor& tensor, bool wanted) { return wanted ? empty_as(tensor) : nothing(shape.dtype); };
  Tensor dx = gradient_of(x, wants_x);
  Tensor ddown_q = gradient_of(down_q, wants_weights), dup_q = gradient_of(up_q, wants_weights);
  Tensor ddown_v = gradient_of(down_v, wants_weights), dup_v = gradient_of(up_v, wants_weights);
  if (!adapters.empty() || rows_all == 0)
    for (const Tensor* gradient : {&ddown_q, &dup_q, &ddown_v, &dup_v}) clear(*gradient);

  Tensor dhidden = empty_as(hidden);
  std::vector<bool> seen(shape.stacked, false);
  for (const Run& run : runs) {
    const int64_t first = run.first * shape.tokens, count = run.count * shape.tokens;
    const Matrix part_dx = matrix_of(dx, rows_all, shape.channels).row_range(first, count);
    if (run.adapter < 0) {
      if (wants_x && count) std::memset(part_dx.data, 0, count * shape.channels * size);
      continue;
    }
    if (count == 0) continue;
    const Matrix gradient = matrix_of(dqkv, rows_all, 3 * shape.out).row_range(first, count);
    const Matrix dq = gradient.column_range(0, shape.out), dv = gradient.column_range(2 * shape.out, shape.out);
    const Matrix dnarrow = matrix_of(dhidden, rows_all, 2 * shape.rank).row_range(first, count);
    const Matrix dnarrow_q = dnarrow.column_range(0, shape.rank), dnarrow_v = dnarrow.column_range(shape.rank, shape.rank);
    multiply(dnarrow_q, dq, weight_of(up_q, run.adapter, shape.out, shape.rank), scale, 0);
    multiply(dnarrow_v, dv, weight_of(up_v, run.adapter, shape.out, shape.rank), scale, 0);
    if (wants_x) {
      multiply(part_dx, dnarrow_q, weight_of(down_q, run.adapter, shape.rank, shape.channels));
      multiply(part_dx, dnarrow_v, weight_of(down_v, run.adapter, shape.rank, shape.channels), 1, 1);
    }
    if (!wants_weights) continue;
    const double beta = seen[run.adapter] ? 1 : 0;
    const Matrix part_x = matrix_of(x, rows_all, shape.channels).row_range(first, count);
    const Matrix narrow = matrix_of(hidden, rows_all, 2 * shape.rank).row_range(first, count);
    multiply(weight_of(ddown_q, run.adapter, shape.rank, shape.channels), dnarrow_q.transposed(), part_x, 1, beta);
    multiply(weight_of(ddown_v, run.adapter, shape.rank, shape.channels), dnarrow_v.transposed(), part_x, 1, beta);
    multiply(
        weight_of(dup_q, run.adapter, shape.out, shape.rank), dq.transposed(), narrow.column_range(0, shape.rank), scale,
        beta);
    multiply(
        weight_of(dup_v, run.adapter, shape.out, shape.rank), dv.transposed(),
        narrow.column_range(shape.rank, shape.rank), scale, beta);
    seen[run.adapter] = true;
  }
  return {dx, ddown_q, dup_q, ddown_v, dup_v};
}

}  // namespace cegate
