#include "frequency.h"

#include <cstring>

#include "products.h"

namespace cegate {
namespace {

int64_t padded(int64_t width) {
  const int64_t lanes = loops().lanes;
  return (width + lanes - 1) / lanes * lanes;
}

class GridFilter {
 public:
  GridFilter(
      const char* op, const Tensor& rows, const Tensor& columns, const Tensor& row_weights,
      const Tensor& column_weights, bool coupled)
      : rows_(dense(rows)), columns_(dense(columns)), row_weights_(dense(row_weights)),
        column_weights_(dense(column_weights)), coupled_(coupled) {
    check_tensor(op, "rows", rows, ScalarType::Float, {-1, -1});
    check_tensor(op, "columns", columns, ScalarType::Float, {-1, -1});
    kept_rows = rows.size(0), height = rows.size(1), kept_columns = columns.size(0), width = columns.size(1);
    check_tensor(op, "row_weights", row_weights, ScalarType::Float, {kept_rows});
    check_tensor(op, "column_weights", column_weights, ScalarType::Float, {kept_columns});
    check(
        !coupled || (kept_rows >= 2 && kept_columns >= 2), op, ": a coupled filter needs two frequencies an axis, given ",
        kept_rows, " and ", kept_columns);
  }

  int64_t kept_rows, height, kept_columns, width;

  // line [W, count] -> its column frequencies [L, count].
  void analyse(const float* line, float* frequencies, int64_t count) const {
    loops().combine(frequencies, count, line, count, columns(), width, 1, kept_columns, width, count);
  }

  // Column frequencies [L, count] -> line [W, count].
  void synthesise(const float* frequencies, float* line, int64_t count) const {
    loops().combine(line, count, frequencies, count, columns(), 1, width, width, kept_columns, count);
  }

  // Column frequencies [H, L, count]: filters in place along the rows, for the column frequencies of one task.
  // The coupled corner joins the last two, so a task holds two of them, counted from the end.
  int64_t tasks() const { return (kept_columns + 1) / 2; }

  void filter(float* frequencies, int64_t task, int64_t count) const {
    const int64_t last = kept_columns - 2 * task, first = std::max<int64_t>(last - 2, 0), taken = last - first;
    const int64_t stride = kept_columns * count;
    std::vector<float> kept(kept_rows * taken * count);
    loops().combine(
        kept.data(), taken * count, frequencies + first * count, stride, rows(), height, 1, kept_rows, height,
        taken * count);
    weigh(kept.data(), first, taken, count, task == 0 && coupled_);
    loops().combine(
        frequencies + first * count, stride, kept.data(), taken * count, rows(), 1, height, height, kept_rows,
        taken * count);
  }

 private:
  const float* rows() const { return static_cast<const float*>(rows_.data_ptr()); }
  const float* columns() const { return static_cast<const float*>(columns_.data_ptr()); }

  void weigh(float* kept, int64_t first, int64_t taken, int64_t count, bool corner) const {
    const float* row_weights = static_cast<const float*>(row_weights_.data_ptr());
    const float* column_weights = static_cast<const float*>(column_weights_.data_ptr());
    const int64_t plain_rows = corner ? kept_rows - 2 : kept_rows;
    for (int64_t k = 0; k < plain_rows; ++k)
      for (int64_t l = 0; l < taken; ++l)
        for (int64_t c = 0; c < count; ++c)
          kept[(k * taken + l) * count + c] *= row_weights[k] * column_weights[first + l];
    if (!corner) return;
    float* cos_cos = kept + (kept_rows - 2) * taken * count;
    float *cos_sin = cos_cos + count, *sin_cos = cos_cos + 2 * count, *sin_sin = cos_cos + 3 * count;
    for (int64_t c = 0; c < count; ++c) {
      const float real = (cos_cos[c] - sin_sin[c]) / 4, mixed = (cos_sin[c] + sin_cos[c]) / 4;
      cos_cos[c] = real, cos_sin[c] = mixed, sin_cos[c] = mixed, sin_sin[c] = -real;
    }
  }

  Tensor rows_, columns_, row_weights_, column_weights_;
  bool coupled_;
};

// Scratch memory of one task; zero, so that the padding behind each row of a line stays zero.
std::vector<float> scratch(int64_t count) { return std::vector<float>(count, 0.0f); }

// Runs body(i) for i in 0..count-1 on torch's thread pool.
template <typename Body>
void for_each(int64_t count, const Body& body) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

// target [M, 3d+3] = source [M, C] times experts [3d, C] and three more rows [3, C]. A product 3d + 3 wide costs a BLAS a
// quarter more than one 3d wide, so the last three columns are our own.
void project(const Matrix& target, const Matrix& source, const Matrix& experts, const char* last) {
  const int64_t wide = target.columns - 3, size = bytes_of(target.dtype), rows_per_task = 64;
  multiply(target.column_range(0, wide), source, experts);
  const TypedLoops& typed = loops_of(target.dtype);
  for_each((target.rows + rows_per_task - 1) / rows_per_task, [&](int64_t task) {
    const int64_t first = task * rows_per_task, rows = std::min(rows_per_task, target.rows - first);
    typed.dot3(
        source.data + first * source.row_stride * size, last, rows, source.columns,
        target.data + (first * target.row_stride + wide) * size, target.row_stride);
  });
}

struct Shape {
  int64_t samples, tokens, channels, width, hidden, stacked;  // width d, hidden 3d+3
  ScalarType dtype;
};

void check_weight(
    const char* op, const char* name, const Tensor& weight, const Shape& shape, bool stacked,
    std::vector<int64_t> expected) {
  if (stacked) expected.insert(expected.begin(), shape.stacked);
  check_tensor(op, name, weight, shape.dtype, expected);
}

Shape check_shapes(
    const char* op, const Tensor& x, const GridFilter& filter, const Tensor& down, const Tensor& up,
    const Tensor& up_bias, const Tensor& router, const Tensor& scale, const std::vector<int64_t>& adapters) {
  const ScalarType dtype = check_dtype(op, "x", x);
  check(x.dim() == 3, op, ": x has shape ", shape_of(x), ", expected [B, H*W, C]");
  check(
      x.size(1) == filter.height * filter.width, op, ": x has ", x.size(1), " tokens, a ", filter.height, " x ",
      filter.width, " grid has ", filter.height * filter.width);
  check(
      down.dim() == 3 || down.dim() == 4, op, ": down has shape ", shape_of(down), ", expected [3, d, C] or [A, 3, d, C]");
  const bool stacked = down.dim() == 4;
  const int64_t width = down.size(down.dim() - 2);
  const Shape shape{x.size(0), x.size(1), x.size(2), width, 3 * width + 3, stacked ? down.size(0) : 1, dtype};
  check(
      !stacked || !adapters.empty() || shape.samples == 0, op, ": stacked weights of ", shape.stacked,
      " adapters need one adapter index a sample");
  check_weight(op, "down", down, shape, stacked, {3, width, shape.channels});
  check_weight(op, "up", up, shape, stacked, {3, shape.channels, width});
  check_weight(op, "up_bias", up_bias, shape, stacked, {3, shape.channels});
  check_weight(op, "router", router, shape, stacked, {3, shape.channels});
  check_weight(op, "scale", scale, shape, stacked, {});
  return shape;
}

// The weights of one adapter as the products take them. Experts and router lie one behind the other for two of the four
// products only; these get a packed copy: enter [3d+3, C] = D1 D2 D3 W_r, leave [C, 3d+3] = U1 U2 U3 c.
class Weights {
 public:
  Weights(
      const Shape& shape, const Tensor& down, const Tensor& up, const Tensor& up_bias, const Tensor& router,
      const Tensor& scale, int64_t adapter)
      : shape_(shape), size_(bytes_of(shape.dtype)) {
    const int64_t c = shape.channels, d = shape.width;
    down_ = data_of(down) + adapter * 3 * d * c * size_;
    up_ = data_of(up) + adapter * 3 * c * d * size_;
    up_bias_ = data_of(up_bias) + adapter * 3 * c * size_;
    router_ = data_of(router) + adapter * 3 * c * size_;
    loops_of(shape.dtype).load(data_of(scale) + adapter * size_, 1, 1, 1, &this->scale, 1);
    leave_.resize(c * shape.hidden * size_);
    for (int64_t j = 0; j < 3; ++j) {
      for (int64_t channel = 0; channel < c; ++channel) {
        char* row = leave_.data() + channel * shape.hidden * size_;
        if (d) std::memcpy(row + j * d * size_, up_ + (j * c + channel) * d * size_, d * size_);
        std::memcpy(row + (3 * d + j) * size_, up_bias_ + (j * c + channel) * size_, size_);
      }
    }
  }

  float scale;
  const char* router() const { return router_; }
  const char* up_bias() const { return up_bias_; }
  Matrix down() const { return Matrix(down_, 3 * shape_.width, shape_.channels, shape_.channels, shape_.dtype); }
  Matrix leave() { return Matrix(leave_.data(), shape_.channels, shape_.hidden, shape_.hidden, shape_.dtype); }
  Matrix enter() {
    const int64_t experts = 3 * shape_.width * shape_.channels * size_, routing = 3 * shape_.channels * size_;
    enter_.resize(experts + routing);
    if (experts) std::memcpy(enter_.data(), down_, experts);
    if (routing) std::memcpy(enter_.data() + experts, router_, routing);
    return Matrix(enter_.data(), shape_.hidden, shape_.channels, shape_.channels, shape_.dtype);
  }

 private:
  Shape shape_;
  int64_t size_;
  char *down_, *up_, *up_bias_, *router_;
  std::vector<char> enter_, leave_;
};

// Column frequencies of the two filtered experts, [B, H, L, 2 padded], and the loops over grid rows around them.
class Bands {
 public:
  Bands(const GridFilter& filter, const Shape& shape, int64_t samples)
      : filter_(filter), typed_(loops_of(shape.dtype)), samples_(samples),
        row_{filter.width, filter.kept_columns, shape.width, padded(shape.width)},
        row_bytes_(filter.width * shape.hidden * bytes_of(shape.dtype)), hidden_(shape.hidden),
        element_(bytes_of(shape.dtype)),
        frequencies_(samples * filter.height * filter.kept_columns * 2 * row_.padded) {}

  // hidden [B, N, 3d+3] -> its activations in place, and mixed.
  void mix(char* hidden, char* mixed, const char* bias) {
    for_lines([&](int64_t line_number, float* line) {
      const char* second = hidden + line_number * row_bytes_ + row_.width * element_;
      typed_.load(second, hidden_, row_.columns, row_.width, line, 2 * row_.padded);
      typed_.load(second + row_.width * element_, hidden_, row_.columns, row_.width, line + row_.padded, 2 * row_.padded);
      filter_.analyse(line, at(line_number), 2 * row_.padded);
    });
    filter_rows();
    for_lines([&](int64_t line_number, float* line) {
      filter_.synthesise(at(line_number), line, 2 * row_.padded);
      typed_.mix(row_, hidden + line_number * row_bytes_, mixed + line_number * row_bytes_, line, bias);
    });
  }

  // dmixed [B, N, 3d+3] -> gradient of hidden in place. With `mixed`: mixed again, and the sums [3d+4] over all tokens.
  std::vector<float> unmix(char* dmixed, const char* active, char* mixed, float scale) {
    const int64_t sums = mixed ? hidden_ + 1 : 0;
    std::vector<float> partial(samples_ * filter_.height * sums, 0.0f);
    for_lines([&](int64_t line_number, float* line) {
      const int64_t offset = line_number * row_bytes_;
      typed_.unmix(
          row_, dmixed + offset, active + offset, scale, line, mixed ? mixed + offset : nullptr,
          partial.data() + line_number * sums);
      filter_.analyse(line, at(line_number), 2 * row_.padded);
    });
    filter_rows();
    for_lines([&](int64_t line_number, float* line) {
      filter_.synthesise(at(line_number), line, 2 * row_.padded);
      typed_.split(row_, dmixed + line_number * row_bytes_, line);
    });
    std::vector<double> total(sums, 0.0);  // float32 would lose what the rows' sums share
    for (size_t i = 0; i < partial.size(); ++i) total[i % sums] += partial[i];
    return std::vector<float>(total.begin(), total.end());
  }

 private:
  float* at(int64_t line_number) { return frequencies_.data() + line_number * filter_.kept_columns * 2 * row_.padded; }

  template <typename Body>
  void for_lines(const Body& body) {
    torch::stable::parallel_for(0, samples_ * filter_.height, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> line = scratch(filter_.width * 2 * row_.padded);
      for (int64_t i = begin; i < end; ++i) body(i, line.data());
    });
  }

  void filter_rows() {
    const int64_t tasks = filter_.tasks();
    for_each(samples_ * tasks, [&](int64_t i) {
      filter_.filter(at(i / tasks * filter_.height), i % tasks, 2 * row_.padded);
    });
  }

  const GridFilter& filter_;
  const TypedLoops& typed_;
  int64_t samples_;
  RowShape row_;
  int64_t row_bytes_, hidden_, element_;
  std::vector<float> frequencies_;
};

}  // namespace

Tensor low_pass(Tensor x, Tensor rows, Tensor columns, Tensor row_weights, Tensor column_weights, bool coupled) {
  const char* op = "low_pass";
  const ScalarType dtype = check_dtype(op, "x", x);
  const GridFilter filter(op, rows, columns, row_weights, column_weights, coupled);
  check_tensor(op, "x", x, dtype, {-1, filter.height * filter.width, -1});
  x = dense(x);
  Tensor y = empty_as(x);
  const TypedLoops& typed = loops_of(dtype);
  const int64_t channels = x.size(2), size = bytes_of(dtype), block = 64, blocks = (channels + block - 1) / block;
  const char* from = data_of(x);
  char* to = data_of(y);
  for_each(x.size(0) * blocks, [&](int64_t task) {
    const int64_t sample = task / blocks, first = task % blocks * block;
    const int64_t count = std::min(block, channels - first), wide = padded(count);
    std::vector<float> line = scratch(filter.width * wide), frequencies(filter.height * filter.kept_columns * wide);
    const int64_t row_bytes = filter.width * channels * size;
    const int64_t start = sample * filter.height * row_bytes + first * size;
    for (int64_t i = 0; i < filter.height; ++i) {
      typed.load(from + start + i * row_bytes, channels, filter.width, count, line.data(), wide);
      filter.analyse(line.data(), frequencies.data() + i * filter.kept_columns * wide, wide);
    }
    for (int64_t pair = 0; pair < filter.tasks(); ++pair) filter.filter(frequencies.data(), pair, wide);
    for (int64_t i = 0; i < filter.height; ++i) {
      filter.synthesise(frequencies.data() + i * filter.kept_columns * wide, line.data(), wide);
      typed.store(to + start + i * row_bytes, channels, filter.width, count, line.data(), wide);
    }
  });
  return y;
}

std::tuple<Tensor, Tensor> frequency_adapter(
    Tensor x, Tensor down, Tensor down_bias, Tensor up, Tensor up_bias, Tensor router, Tensor router_bias, Tensor scale,
    Tensor rows, Tensor columns, Tensor row_weights, Tensor column_weights, bool coupled,
    std::vector<int64_t> adapters) {
  const char* op = "frequency_adapter";
  const GridFilter filter(op, rows, columns, row_weights, column_weights, coupled);
  const Shape shape = check_shapes(op, x, filter, down, up, up_bias, router, scale, adapters);
  const bool stacked = down.dim() == 4;
  check_weight(op, "down_bias", down_bias, shape, stacked, {3, shape.width});
  check_weight(op, "router_bias", router_bias, shape, stacked, {3});
  const auto runs = runs_of(op, adapters, shape.samples, shape.stacked);
  x = dense(x), down = dense(down), down_bias = dense(down_bias), up = dense(up);
  up_bias = dense(up_bias), router = dense(router), router_bias = dense(router_bias);
  scale = dense(scale);

  const int64_t size = bytes_of(shape.dtype), rows_all = shape.samples * shape.tokens;
  Tensor y = empty_as(x), active = empty({shape.samples, shape.tokens, shape.hidden}, shape.dtype);
  Tensor mixed = empty({longest(runs), shape.tokens, shape.hidden}, shape.dtype);
  const Matrix all_x = matrix_of(x, rows_all, shape.channels), all_y = matrix_of(y, rows_all, shape.channels);
  const Matrix all_active = matrix_of(active, rows_all, shape.hidden);
  for (const Run& run : runs) {
    const int64_t first = run.first * shape.tokens, count = run.count * shape.tokens;
    if (count == 0) continue;
    const Matrix part_x = all_x.row_range(first, count), part_y = all_y.row_range(first, count);
    const Matrix hidden = all_active.row_range(first, count), code = matrix_of(mixed, count, shape.hidden);
    if (run.adapter < 0) {
      std::memcpy(part_y.data, part_x.data, count * shape.channels * size);
      std::memset(hidden.data, 0, count * shape.hidden * size);
      continue;
    }
    Weights weights(shape, down, up, up_bias, router, scale, run.adapter);
    std::vector<char> bias(shape.hidden * size);
    const int64_t experts = 3 * shape.width * size;
    if (experts) std::memcpy(bias.data(), data_of(down_bias) + run.adapter * experts, experts);
    std::memcpy(bias.data() + experts, data_of(router_bias) + run.adapter * 3 * size, 3 * size);
    project(hidden, part_x, weights.down().transposed(), weights.router());
    Bands(filter, shape, run.count).mix(hidden.data, code.data, bias.data());
    multiply_add(part_y, part_x, code, weights.leave().transposed(), weights.scale);
  }
  return {y, active};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> frequency_adapter_backward(
    Tensor dy, Tensor x, Tensor active, Tensor down, Tensor up, Tensor up_bias, Tensor router, Tensor scale, Tensor rows,
    Tensor columns, Tensor row_weights, Tensor column_weights, bool coupled, std::vector<int64_t> adapters, bool wants_x,
    bool wants_weights) {
  const char* op = "frequency_adapter_backward";
  const GridFilter filter(op, rows, columns, row_weights, column_weights, coupled);
  const Shape shape = check_shapes(op, x, filter, down, up, up_bias, router, scale, adapters);
  check_tensor(op, "dy", dy, shape.dtype, {shape.samples, shape.tokens, shape.channels});
  check_tensor(op, "active", active, shape.dtype, {shape.samples, shape.tokens, shape.hidden});
  const auto runs = runs_of(op, adapters, shape.samples, shape.stacked);
  dy = dense(dy), x = dense(x), active = dense(active), down = dense(down), up = dense(up);
  up_bias = dense(up_bias), router = dense(router), scale = dense(scale);

  const int64_t size = bytes_of(shape.dtype), rows_all = shape.samples * shape.tokens;
  const int64_t c = shape.channels, d = shape.width, a = shape.stacked;
  Tensor dx = wants_x ? empty_as(x) : nothing(shape.dtype);
  // gradients of the packed weights: enter [A, 3d+3, C], leave [A, C, 3d+3]
  Tensor denter = wants_weights ? empty({a, shape.hidden, c}, shape.dtype) : nothing(shape.dtype);
  Tensor dleave = wants_weights ? empty({a, c, shape.hidden}, shape.dtype) : nothing(shape.dtype);
  std::vector<float> dbias(wants_weights ? a * (shape.hidden + 1) : 0, 0.0f);
  std::vector<bool> seen(a, false);
  if (!adapters.empty() || rows_all == 0)
    for (const Tensor* gradient : {&denter, &dleave})
      if (gradient->numel()) std::memset(data_of(*gradient), 0, gradient->numel() * size);

  Tensor dmixed = empty({longest(runs), shape.tokens, shape.hidden}, shape.dtype);
  Tensor mixed = wants_weights ? empty_as(dmixed) : nothing(shape.dtype);
  for (const Run& run : runs) {
    const int64_t first = run.first * shape.tokens, count = run.count * shape.tokens;
    if (count == 0) continue;
    const Matrix part_dy = matrix_of(dy, rows_all, c).row_range(first, count);
    const Matrix part_dx = matrix_of(dx, rows_all, c).row_range(first, count);
    if (run.adapter < 0) {
      if (wants_x) std::memcpy(part_dx.data, part_dy.data, count * c * size);
      continue;
    }
    Weights weights(shape, down, up, up_bias, router, scale, run.adapter);
    const Matrix gradient = matrix_of(dmixed, count, shape.hidden), code = matrix_of(mixed, count, shape.hidden);
    const char* kept = matrix_of(active, rows_all, shape.hidden).row_range(first, count).data;
    project(gradient, part_dy, weights.leave().column_range(0, 3 * d), weights.up_bias());
    const auto sums = Bands(filter, shape, run.count).unmix(gradient.data, kept, wants_weights ? code.data : nullptr, weights.scale);
    if (wants_x) multiply_add(part_dx, part_dy, gradient, weights.enter(), 1.0);
    if (!wants_weights) continue;
    const double beta = seen[run.adapter] ? 1 : 0;  // an adapter may come in several runs
    const Matrix part_x = matrix_of(x, rows_all, c).row_range(first, count);
    const Matrix enter = matrix_of(denter, a * shape.hidden, c).row_range(run.adapter * shape.hidden, shape.hidden);
    const Matrix leave = matrix_of(dleave, a * c, shape.hidden).row_range(run.adapter * c, c);
    multiply(enter, gradient.transposed(), part_x, 1, beta);
    multiply(leave, part_dy.transposed(), code, weights.scale, beta);
    seen[run.adapter] = true;
    for (int64_t i = 0; i <= shape.hidden; ++i) dbias[run.adapter * (shape.hidden + 1) + i] += sums[i];
  }
  if (!wants_weights) {
    const ScalarType t = shape.dtype;
    return {dx, nothing(t), nothing(t), nothing(t), nothing(t), nothing(t), nothing(t), nothing(t)};
  }

  Tensor ddown = empty_as(down), dup = empty_as(up), dup_bias = empty_as(up_bias), drouter = empty_as(router);
  Tensor dscale = empty_as(scale);
  const bool stacked = down.dim() == 4;
  Tensor ddown_bias = stacked ? empty({a, 3, d}, shape.dtype) : empty({3, d}, shape.dtype);
  Tensor drouter_bias = stacked ? empty({a, 3}, shape.dtype) : empty({3}, shape.dtype);
  auto move = [size](char* target, int64_t to, const char* source, int64_t from, int64_t count) {
    if (count) std::memcpy(target + to * size, source + from * size, count * size);
  };
  char *to_down = data_of(ddown), *to_up = data_of(dup), *to_up_bias = data_of(dup_bias), *to_router = data_of(drouter);
  const char *from_enter = data_of(denter), *from_leave = data_of(dleave);
  const TypedLoops& typed = loops_of(shape.dtype);
  for (int64_t i = 0; i < a; ++i) {
    move(to_down, i * 3 * d * c, from_enter, i * shape.hidden * c, 3 * d * c);
    move(to_router, i * 3 * c, from_enter, (i * shape.hidden + 3 * d) * c, 3 * c);
    for (int64_t j = 0; j < 3; ++j) {
      for (int64_t channel = 0; channel < c; ++channel) {
        const int64_t row = (i * c + channel) * shape.hidden;
        move(to_up, ((i * 3 + j) * c + channel) * d, from_leave, row + j * d, d);
        move(to_up_bias, (i * 3 + j) * c + channel, from_leave, row + 3 * d + j, 1);
      }
    }
    const float* bias = dbias.data() + i * (shape.hidden + 1);
    typed.store(data_of(ddown_bias) + i * 3 * d * size, 3 * d, 1, 3 * d, bias, 3 * d);
    typed.store(data_of(drouter_bias) + i * 3 * size, 3, 1, 3, bias + 3 * d, 3);
    typed.store(data_of(dscale) + i * size, 1, 1, 1, bias + shape.hidden, 1);
  }
  return {dx, ddown, ddown_bias, dup, dup_bias, drouter, drouter_bias, dscale};
}

}  // namespace cegate
