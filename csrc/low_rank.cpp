#include "low_rank.h"

#include <cstring>

#include "passes.h"

namespace cegate {
namespace {

struct Shape {
  int64_t samples, tokens, channels, rank, out;
  int64_t stacked;  // adapters in a stack; -1: the weights are no stack
  ScalarType dtype;

  int64_t rows() const { return samples * tokens; }
  int64_t adapters() const { return stacked < 0 ? 1 : stacked; }
};

Activation activation_of(const char* op, int64_t code) {
  check(code >= 0 && code <= 2, op, ": activation is ", code, ", accepted are 0 (none), 1 (relu), 2 (gelu)");
  return static_cast<Activation>(code);
}

Shape check_shapes(const char* op, const Tensor& x, const Tensor& down, const Tensor& up, const std::vector<int64_t>& adapters) {
  const ScalarType dtype = check_dtype(op, "x", x);
  check(x.dim() == 3, op, ": x has shape ", shape_of(x), ", expected [B, T, C]");
  check(down.dim() == 2 || down.dim() == 3, op, ": down has shape ", shape_of(down), ", expected [r, C] or [A, r, C]");
  const bool stacked = down.dim() == 3;
  check(up.dim() == down.dim(), op, ": up has shape ", shape_of(up), ", down has ", shape_of(down));
  const Shape shape{x.size(0), x.size(1), x.size(2), down.size(down.dim() - 2), up.size(up.dim() - 2),
                    stacked ? down.size(0) : -1, dtype};
  check(
      !stacked || !adapters.empty() || shape.samples == 0, op, ": stacked weights of ", shape.stacked,
      " adapters need one adapter index a sample");
  check_weight(op, "down", down, dtype, shape.stacked, {shape.rank, shape.channels});
  check_weight(op, "up", up, dtype, shape.stacked, {shape.out, shape.rank});
  return shape;
}

// A weight's gradient, [shape...] or stacked; of no element unless wanted.
Tensor gradient_of(const Shape& shape, bool wanted, std::vector<int64_t> sizes) {
  if (!wanted) return nothing(shape.dtype);
  if (shape.stacked >= 0) sizes.insert(sizes.begin(), shape.stacked);
  return empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), shape.dtype);
}

Tensor tokens_of(const Shape& shape, bool wanted, int64_t columns) {
  return wanted ? empty({shape.samples, shape.tokens, columns}, shape.dtype) : nothing(shape.dtype);
}

void clear(const Matrix& rows) { std::memset(rows.data, 0, rows.rows * rows.columns * bytes_of(rows.dtype)); }

}  // namespace

std::tuple<Tensor, Tensor> low_rank(
    Tensor x, Tensor down, Tensor up, std::optional<Tensor> base, std::optional<Tensor> down_bias,
    std::optional<Tensor> up_bias, int64_t activation_code, double scale, std::vector<int64_t> adapters, bool keeps) {
  const char* op = "low_rank";
  const Shape shape = check_shapes(op, x, down, up, adapters);
  const Activation activation = activation_of(op, activation_code);
  const auto runs = runs_of(op, adapters, shape.samples, shape.stacked);
  if (base) check_tensor(op, "base", *base, shape.dtype, {shape.samples, shape.tokens, shape.out});
  if (down_bias) {
    check_weight(op, "down_bias", *down_bias, shape.dtype, shape.stacked, {shape.rank});
    down_bias = dense(*down_bias);
  }
  if (up_bias) {
    check_weight(op, "up_bias", *up_bias, shape.dtype, shape.stacked, {shape.out});
    up_bias = dense(*up_bias);
  }
  x = dense(x), down = dense(down), up = dense(up);
  // a part of a fused qkv output needs no copy: its rows are evenly spaced
  const bool even = base && (shape.out == 1 || base->stride(2) == 1) &&
                    (shape.samples == 1 || shape.tokens == 1 || base->stride(0) == shape.tokens * base->stride(1));
  if (base && !even) base = dense(*base);

  const TypedLoops& typed = loops_of(shape.dtype);
  const Tensor y = tokens_of(shape, true, shape.out), kept = tokens_of(shape, keeps, shape.rank);
  RowPass pass(runs, shape.tokens, shape.dtype);
  const Rows all_y = matrix_of(y, shape.rows(), shape.out), all_x = matrix_of(x, shape.rows(), shape.channels);
  const Rows pre = keeps ? Rows(matrix_of(kept, shape.rows(), shape.rank)) : pass.temporary(shape.rank);
  const bool activates = activation != Activation::none;
  const Rows hidden = activates && keeps ? pass.temporary(shape.rank) : pre;
  std::optional<Rows> all_base;
  if (base) {
    // the stride of an axis of one element means nothing
    const int64_t stride = shape.tokens > 1 ? base->stride(1) : base->stride(0);
    all_base = Matrix(data_of(*base), shape.rows(), shape.out, stride, shape.dtype);
  }
  const WeightOf narrow_bias = down_bias ? weight_of(*down_bias, 1, shape.rank) : WeightOf();

  pass.product({.out = pre, .a = all_x, .b = transposed(weight_of(down, shape.rank, shape.channels)), .bias = narrow_bias});
  if (activates) {
    pass.loop([&](const Block& block) {
      typed.activate(block.of(pre).data, block.of(hidden).data, activation, block.rows, shape.rank);
    });
  }
  pass.product(
      {.out = all_y, .a = hidden, .b = transposed(weight_of(up, shape.out, shape.rank)), .alpha = scale, .base = all_base,
       .bias = up_bias ? weight_of(*up_bias, 1, shape.out) : WeightOf()});
  pass.off([&](const Block& block) {
    const Matrix target = block.of(all_y);
    if (keeps) clear(block.of(pre));
    if (!all_base) return clear(target);
    const Matrix from = block.of(*all_base);
    typed.add_bias(target.data, target.row_stride, from.data, from.row_stride, nullptr, 0, block.rows, shape.out);
  });
  pass.run();
  return {y, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> low_rank_backward(
    Tensor dy, Tensor x, Tensor pre, Tensor down, Tensor up, bool down_bias, bool up_bias, int64_t activation_code,
    double scale, std::vector<int64_t> adapters, bool wants_x, bool wants_weights) {
  const char* op = "low_rank_backward";
  const Shape shape = check_shapes(op, x, down, up, adapters);
  const Activation activation = activation_of(op, activation_code);
  const auto runs = runs_of(op, adapters, shape.samples, shape.stacked);
  check_tensor(op, "dy", dy, shape.dtype, {shape.samples, shape.tokens, shape.out});
  check_tensor(op, "pre", pre, shape.dtype, {shape.samples, shape.tokens, shape.rank});
  dy = dense(dy), x = dense(x), pre = dense(pre), down = dense(down), up = dense(up);

  const TypedLoops& typed = loops_of(shape.dtype);
  const bool recomputes = wants_weights && activation != Activation::none;
  const Tensor dpre = tokens_of(shape, wants_weights, shape.rank);
  Tensor active = tokens_of(shape, recomputes, shape.rank);
  RowPass enters(runs, shape.tokens, shape.dtype);
  const Rows all_dy = matrix_of(dy, shape.rows(), shape.out), all_x = matrix_of(x, shape.rows(), shape.channels);
  const Rows all_pre = matrix_of(pre, shape.rows(), shape.rank);
  const Rows hidden = recomputes ? Rows(matrix_of(active, shape.rows(), shape.rank)) : all_pre;
  const Rows narrow = wants_weights ? Rows(matrix_of(dpre, shape.rows(), shape.rank)) : enters.temporary(shape.rank);
  enters.product({.out = narrow, .a = all_dy, .b = weight_of(up, shape.out, shape.rank), .alpha = scale});
  if (activation != Activation::none) {
    enters.loop([&](const Block& block) {
      typed.deactivate(
          block.of(narrow).data, block.of(all_pre).data, recomputes ? block.of(hidden).data : nullptr, activation,
          block.rows, shape.rank);
    });
  }
  Tensor dx = nothing(shape.dtype);
  auto leave = [&](RowPass& pass) {
    if (!wants_x) return pass.run();
    dx = tokens_of(shape, true, shape.channels);
    const Rows all_dx = matrix_of(dx, shape.rows(), shape.channels);
    pass.product({.out = all_dx, .a = narrow, .b = weight_of(down, shape.rank, shape.channels)});
    pass.off([&](const Block& block) { clear(block.of(all_dx)); });
    pass.run();
  };
  if (!wants_weights) {
    leave(enters);
    return {dx, nothing(shape.dtype), nothing(shape.dtype), nothing(shape.dtype), nothing(shape.dtype)};
  }
  enters.run();

  const Tensor ddown = gradient_of(shape, true, {shape.rank, shape.channels});
  const Tensor dup = gradient_of(shape, true, {shape.out, shape.rank});
  const Tensor ddown_bias = gradient_of(shape, down_bias, {shape.rank}), dup_bias = gradient_of(shape, up_bias, {shape.out});
  TokenSums sums(runs, shape.tokens, shape.dtype, shape.adapters());
  sums.product(weight_of(ddown, shape.rank, shape.channels), narrow, all_x);
  sums.product(weight_of(dup, shape.out, shape.rank), all_dy, hidden, scale);
  if (down_bias) sums.sum(weight_of(ddown_bias, 1, shape.rank), narrow);
  if (up_bias) sums.sum(weight_of(dup_bias, 1, shape.out), all_dy, scale);
  sums.run();
  active = nothing(shape.dtype);  // gone before dx is made
  RowPass leaves(runs, shape.tokens, shape.dtype);
  leave(leaves);
  return {dx, ddown, dup, ddown_bias, dup_bias};
}

std::tuple<Tensor, Tensor, Tensor> low_rank_factors(
    Tensor x, Tensor dy, Tensor down, Tensor up, std::optional<Tensor> down_bias, int64_t activation_code, double scale) {
  const char* op = "low_rank_factors";
  const Shape shape = check_shapes(op, x, down, up, {});
  const Activation activation = activation_of(op, activation_code);
  const auto runs = runs_of(op, {}, shape.samples, shape.stacked);
  check(shape.stacked < 0, op, ": down has shape ", shape_of(down), ", expected [r, C]");
  check_tensor(op, "dy", dy, shape.dtype, {shape.samples, shape.tokens, shape.out});
  if (down_bias) {
    check_weight(op, "down_bias", *down_bias, shape.dtype, shape.stacked, {shape.rank});
    down_bias = dense(*down_bias);
  }
  x = dense(x), dy = dense(dy), down = dense(down), up = dense(up);

  const TypedLoops& typed = loops_of(shape.dtype);
  const Tensor dx = tokens_of(shape, true, shape.channels), dpre = tokens_of(shape, true, shape.rank);
  const Tensor hidden = tokens_of(shape, true, shape.rank);
  RowPass pass(runs, shape.tokens, shape.dtype);
  const Rows all_x = matrix_of(x, shape.rows(), shape.channels), all_dy = matrix_of(dy, shape.rows(), shape.out);
  const Rows all_dx = matrix_of(dx, shape.rows(), shape.channels), narrow = matrix_of(dpre, shape.rows(), shape.rank);
  const Rows all_hidden = matrix_of(hidden, shape.rows(), shape.rank);
  const bool activates = activation != Activation::none;
  const Rows pre = activates ? pass.temporary(shape.rank) : all_hidden;

  // without an activation hidden = scale * pre comes out of the product
  pass.product(
      {.out = pre, .a = all_x, .b = transposed(weight_of(down, shape.rank, shape.channels)), .alpha = activates ? 1.0 : scale,
       .bias = down_bias ? weight_of(*down_bias, 1, shape.rank) : WeightOf()});
  pass.product({.out = narrow, .a = all_dy, .b = weight_of(up, shape.out, shape.rank), .alpha = scale});
  if (activates) {
    pass.loop([&](const Block& block) {
      const Matrix active = block.of(all_hidden);
      typed.deactivate(block.of(narrow).data, block.of(pre).data, active.data, activation, block.rows, shape.rank);
      typed.scale(active.data, static_cast<float>(scale), block.rows * shape.rank);
    });
  }
  pass.product({.out = all_dx, .a = narrow, .b = weight_of(down, shape.rank, shape.channels)});
  pass.run();
  return {dx, dpre, hidden};
}

namespace {

// Both halves of a LoRA on q and v: a view of one half of the narrow hidden tensor, and of q or v.
struct Half {
  const Tensor &down, &up;
  int64_t number;  // 0: q, 1: v

  Rows narrow(const Rows& hidden, int64_t rank) const { return hidden.column_range(number * rank, rank); }
  Rows wide(const Rows& qkv, int64_t out) const { return qkv.column_range(2 * number * out, out); }
};

Shape check_both(
    const char* op, const Tensor& x, const Tensor& down_q, const Tensor& up_q, const Tensor& down_v, const Tensor& up_v,
    const std::vector<int64_t>& adapters) {
  const Shape shape = check_shapes(op, x, down_q, up_q, adapters);
  check_weight(op, "down_v", down_v, shape.dtype, shape.stacked, {shape.rank, shape.channels});
  check_weight(op, "up_v", up_v, shape.dtype, shape.stacked, {shape.out, shape.rank});
  return shape;
}

// Whether some memory belongs to both.
bool overlap(const Tensor& a, const Tensor& b) {
  const char *first = data_of(a), *second = data_of(b);
  return first < second + b.numel() * bytes_of(b.scalar_type()) && second < first + a.numel() * bytes_of(a.scalar_type());
}

}  // namespace

Tensor low_rank_qv_(
    Tensor qkv, Tensor x, Tensor down_q, Tensor up_q, Tensor down_v, Tensor up_v, double scale,
    std::vector<int64_t> adapters, bool keeps) {
  const char* op = "low_rank_qv_";
  const Shape shape = check_both(op, x, down_q, up_q, down_v, up_v, adapters);
  check_tensor(op, "qkv", qkv, shape.dtype, {shape.samples, shape.tokens, 3 * shape.out});
  check(qkv.is_contiguous(), op, ": qkv is changed in place and must be contiguous");
  const auto runs = runs_of(op, adapters, shape.samples, shape.stacked);
  x = dense(x), down_q = dense(down_q), up_q = dense(up_q);
  down_v = dense(down_v), up_v = dense(up_v);
  // blocks of x are read before theirs of qkv change, and after others changed
  if (overlap(qkv, x)) x = torch::stable::clone(x);

  const Tensor kept = tokens_of(shape, keeps, 2 * shape.rank);
  RowPass pass(runs, shape.tokens, shape.dtype);
  const Rows all_qkv = matrix_of(qkv, shape.rows(), 3 * shape.out), all_x = matrix_of(x, shape.rows(), shape.channels);
  const Rows hidden = keeps ? Rows(matrix_of(kept, shape.rows(), 2 * shape.rank)) : pass.temporary(2 * shape.rank);
  for (const Half& half : {Half{down_q, up_q, 0}, Half{down_v, up_v, 1}}) {
    const Rows narrow = half.narrow(hidden, shape.rank), wide = half.wide(all_qkv, shape.out);
    pass.product({.out = narrow, .a = all_x, .b = transposed(weight_of(half.down, shape.rank, shape.channels))});
    pass.product(
        {.out = wide, .a = narrow, .b = transposed(weight_of(half.up, shape.out, shape.rank)), .alpha = scale, .base = wide});
  }
  pass.off([&](const Block& block) {
    if (keeps) clear(block.of(hidden));
  });
  pass.run();
  return kept;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> low_rank_qv_backward(
    Tensor dqkv, Tensor x, Tensor hidden, Tensor down_q, Tensor up_q, Tensor down_v, Tensor up_v, double scale,
    std::vector<int64_t> adapters, bool wants_x, bool wants_weights) {
  const char* op = "low_rank_qv_backward";
  const Shape shape = check_both(op, x, down_q, up_q, down_v, up_v, adapters);
  check_tensor(op, "dqkv", dqkv, shape.dtype, {shape.samples, shape.tokens, 3 * shape.out});
  check_tensor(op, "hidden", hidden, shape.dtype, {shape.samples, shape.tokens, 2 * shape.rank});
  const auto runs = runs_of(op, adapters, shape.samples, shape.stacked);
  dqkv = dense(dqkv), x = dense(x), hidden = dense(hidden), down_q = dense(down_q);
  up_q = dense(up_q), down_v = dense(down_v), up_v = dense(up_v);

  const Tensor dx = tokens_of(shape, wants_x, shape.channels), dhidden = tokens_of(shape, wants_weights, 2 * shape.rank);
  RowPass pass(runs, shape.tokens, shape.dtype);
  const Rows all_dqkv = matrix_of(dqkv, shape.rows(), 3 * shape.out), all_x = matrix_of(x, shape.rows(), shape.channels);
  const Rows all_dx = matrix_of(dx, shape.rows(), shape.channels);
  const Rows all_hidden = matrix_of(hidden, shape.rows(), 2 * shape.rank);
  const Rows dnarrow =
      wants_weights ? Rows(matrix_of(dhidden, shape.rows(), 2 * shape.rank)) : pass.temporary(2 * shape.rank);
  const Half halves[] = {{down_q, up_q, 0}, {down_v, up_v, 1}};
  for (const Half& half : halves) {
    const Rows narrow = half.narrow(dnarrow, shape.rank);
    pass.product(
        {.out = narrow, .a = half.wide(all_dqkv, shape.out), .b = weight_of(half.up, shape.out, shape.rank), .alpha = scale});
    if (!wants_x) continue;
    const std::optional<Rows> before = half.number ? std::optional<Rows>(all_dx) : std::nullopt;
    pass.product({.out = all_dx, .a = narrow, .b = weight_of(half.down, shape.rank, shape.channels), .base = before});
  }
  pass.off([&](const Block& block) {
    if (wants_x) clear(block.of(all_dx));
  });
  pass.run();

  const Tensor ddown_q = gradient_of(shape, wants_weights, {shape.rank, shape.channels});
  const Tensor dup_q = gradient_of(shape, wants_weights, {shape.out, shape.rank});
  const Tensor ddown_v = gradient_of(shape, wants_weights, {shape.rank, shape.channels});
  const Tensor dup_v = gradient_of(shape, wants_weights, {shape.out, shape.rank});
  if (wants_weights) {
    TokenSums sums(runs, shape.tokens, shape.dtype, shape.adapters());
    for (const Half& half : halves) {
      const WeightOf ddown = weight_of(half.number ? ddown_v : ddown_q, shape.rank, shape.channels);
      const WeightOf dup = weight_of(half.number ? dup_v : dup_q, shape.out, shape.rank);
      sums.product(ddown, half.narrow(dnarrow, shape.rank), all_x);
      sums.product(dup, half.wide(all_dqkv, shape.out), half.narrow(all_hidden, shape.rank), scale);
    }
    sums.run();
  }
  return {dx, ddown_q, dup_q, ddown_v, dup_v};
}

}  // namespace cegate
