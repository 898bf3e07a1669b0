#include "frequency.h"

#include <cstring>

#include "grid_filter.h"
#include "passes.h"

namespace cegate {
namespace {

// Scratch memory of one task; zero, so that the padding behind each row of a line stays zero.
std::vector<float> scratch(int64_t count) { return std::vector<float>(count, 0.0f); }

// Runs body(i) for i in 0..count-1 on torch's thread pool.
template <typename Body>
void for_each(int64_t count, const Body& body) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

struct Shape {
  int64_t samples, tokens, channels, width, hidden;  // width d, hidden 3d+3
  int64_t stacked;  // adapters in a stack; -1: the weights are no stack
  ScalarType dtype;

  int64_t rows() const { return samples * tokens; }
  int64_t adapters() const { return stacked < 0 ? 1 : stacked; }
};

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
  const Shape shape{x.size(0), x.size(1), x.size(2), width, 3 * width + 3, stacked ? down.size(0) : -1, dtype};
  check(
      !stacked || !adapters.empty() || shape.samples == 0, op, ": stacked weights of ", shape.stacked,
      " adapters need one adapter index a sample");
  check_weight(op, "down", down, dtype, shape.stacked, {3, width, shape.channels});
  check_weight(op, "up", up, dtype, shape.stacked, {3, shape.channels, width});
  check_weight(op, "up_bias", up_bias, dtype, shape.stacked, {3, shape.channels});
  check_weight(op, "router", router, dtype, shape.stacked, {3, shape.channels});
  check_weight(op, "scale", scale, dtype, shape.stacked, {});
  return shape;
}

// The weights of one adapter as the products take them. Experts and router lie one behind the other for two of the four
// products only; these get a packed copy: enter [3d+3, C] = D1 D2 D3 W_r, leave [C, 3d+3] = U1 U2 U3 c.
class Weights {
 public:
  Weights(
      const Shape& shape, const Tensor& down, const Tensor& up, const Tensor& up_bias, const Tensor& router,
      const Tensor& scale, int64_t adapter)
      : shape_(shape), size_(bytes_of(shape.dtype)), leave_(empty({shape.channels, shape.hidden}, shape.dtype)) {
    const int64_t c = shape.channels, d = shape.width;
    down_ = data_of(down) + adapter * 3 * d * c * size_;
    const char* experts = data_of(up) + adapter * 3 * c * d * size_;
    up_bias_ = data_of(up_bias) + adapter * 3 * c * size_;
    router_ = data_of(router) + adapter * 3 * c * size_;
    loops_of(shape.dtype).load(data_of(scale) + adapter * size_, 1, 1, 1, &this->scale, 1);
    for (int64_t j = 0; j < 3; ++j) {
      for (int64_t channel = 0; channel < c; ++channel) {
        char* row = data_of(leave_) + channel * shape.hidden * size_;
        if (d) std::memcpy(row + j * d * size_, experts + (j * c + channel) * d * size_, d * size_);
        std::memcpy(row + (3 * d + j) * size_, up_bias_ + (j * c + channel) * size_, size_);
      }
    }
  }

  void add_biases(const Tensor& down_bias, const Tensor& router_bias, int64_t adapter) {
    const int64_t experts = 3 * shape_.width * size_;
    bias_.resize(experts + 3 * size_);
    if (experts) std::memcpy(bias_.data(), data_of(down_bias) + adapter * experts, experts);
    std::memcpy(bias_.data() + experts, data_of(router_bias) + adapter * 3 * size_, 3 * size_);
  }

  void add_enter() {
    const int64_t experts = 3 * shape_.width * shape_.channels * size_, routing = 3 * shape_.channels * size_;
    enter_ = empty({shape_.hidden, shape_.channels}, shape_.dtype);
    if (experts) std::memcpy(data_of(*enter_), down_, experts);
    if (routing) std::memcpy(data_of(*enter_) + experts, router_, routing);
  }

  float scale;
  const char* router() const { return router_; }
  const char* up_bias() const { return up_bias_; }
  const char* bias() const { return bias_.data(); }
  Matrix down() const { return Matrix(down_, 3 * shape_.width, shape_.channels, shape_.channels, shape_.dtype); }
  Matrix leave() const { return matrix_of(leave_, shape_.channels, shape_.hidden); }
  Matrix enter() const { return matrix_of(*enter_, shape_.hidden, shape_.channels); }

 private:
  Shape shape_;
  int64_t size_;
  char *down_, *up_bias_, *router_;
  Tensor leave_;
  std::optional<Tensor> enter_;
  std::vector<char> bias_;
};

// Those of every adapter that some sample has; the others stay empty.
class WeightsOfAdapters {
 public:
  template <typename... Parts>
  WeightsOfAdapters(const std::vector<Run>& runs, const Shape& shape, const Parts&... parts) : each_(shape.adapters()) {
    for (const Run& run : runs)
      if (run.adapter >= 0 && !each_[run.adapter]) each_[run.adapter].emplace(shape, parts..., run.adapter);
  }

  template <typename Body>
  void for_each(const Body& body) {
    for (size_t a = 0; a < each_.size(); ++a)
      if (each_[a]) body(*each_[a], a);
  }
  Weights& of(int64_t adapter) { return *each_[adapter]; }
  WeightOf weight(Matrix (*view)(Weights&)) {
    return [this, view](int64_t adapter) { return view(*each_[adapter]); };
  }
  void release() { each_.clear(); }
  Factor scale() {
    std::vector<float> scales;
    for (const auto& weights : each_) scales.push_back(weights ? weights->scale : 0.0f);
    return Factor(std::move(scales));
  }

 private:
  std::vector<std::optional<Weights>> each_;
};

Matrix down_transposed(Weights& weights) { return weights.down().transposed(); }
Matrix leave_transposed(Weights& weights) { return weights.leave().transposed(); }
Matrix leave_experts(Weights& weights) { return weights.leave().column_range(0, weights.leave().columns - 3); }
Matrix enter(Weights& weights) { return weights.enter(); }

// target [rows, 3d+3], last three columns = source [rows, C] times last [3, C]: in a product they would take a whole panel.
void project_last(const Shape& shape, const Matrix& target, const Matrix& source, const char* last) {
  loops_of(shape.dtype).dot3(
      source.data, last, source.rows, shape.channels, target.column_range(3 * shape.width, 3).data, target.row_stride);
}

void copy(const Matrix& target, const Matrix& source) {
  std::memcpy(target.data, source.data, target.rows * target.columns * bytes_of(target.dtype));
}

// Column frequencies of the two filtered experts, [B, H, L, 2 padded], and the loops over grid rows around them.
class Bands {
 public:
  Bands(const GridFilter& filter, const Shape& shape, const std::vector<Run>& runs)
      : filter_(filter), typed_(loops_of(shape.dtype)), shape_(shape),
        row_{filter.width, filter.kept_columns, shape.width, padded(shape.width)},
        row_bytes_(filter.width * shape.hidden * bytes_of(shape.dtype)),
        frequencies_(empty({shape.samples * filter.height * filter.kept_columns, 2 * row_.padded}, ScalarType::Float)) {
    for (const Run& run : runs)
      for (int64_t b = run.first; run.adapter >= 0 && b < run.first + run.count; ++b) on_.push_back(b);
  }

  // Experts 2 and 3 of hidden [rows, 3d+3] -> their column frequencies.
  void analyse(const Block& block, const Matrix& hidden) {
    for_lines(block, [&](int64_t i, float* frequencies, float* line) {
      const char* second = hidden.data + i * row_bytes_ + row_.width * bytes_of(shape_.dtype);
      const char* third = second + row_.width * bytes_of(shape_.dtype);
      typed_.load(second, shape_.hidden, row_.columns, row_.width, line, 2 * row_.padded);
      typed_.load(third, shape_.hidden, row_.columns, row_.width, line + row_.padded, 2 * row_.padded);
      filter_.analyse(line, frequencies, 2 * row_.padded);
    });
  }

  // Between the passes: along the grid's other axis.
  void filter_rows() {
    const int64_t tasks = filter_.tasks();
    for_each(static_cast<int64_t>(on_.size()) * tasks, [&](int64_t i) {
      filter_.filter(at(on_[i / tasks] * filter_.height), i % tasks, 2 * row_.padded);
    });
  }

  // hidden [rows, 3d+3] -> its activations in place, and mixed.
  void mix(const Block& block, const Matrix& hidden, const Matrix& mixed, const char* bias) {
    for_lines(block, [&](int64_t i, float* frequencies, float* line) {
      filter_.synthesise(frequencies, line, 2 * row_.padded);
      typed_.mix(row_, hidden.data + i * row_bytes_, mixed.data + i * row_bytes_, line, bias);
    });
  }

  // dmixed [rows, 3d+3] -> gradient of the activations' input in its place, and the column frequencies of its experts 2
  // and 3. With `mixed`: mixed again, and sums [lines of the batch, 3d+4].
  void unmix(const Block& block, const Matrix& dmixed, const Matrix& active, char* mixed, float scale, float* sums) {
    for_lines(block, [&](int64_t i, float* frequencies, float* line) {
      const int64_t offset = i * row_bytes_;
      typed_.unmix(
          row_, dmixed.data + offset, active.data + offset, scale, line, mixed ? mixed + offset : nullptr,
          mixed ? sums + (block.first / row_.columns + i) * (shape_.hidden + 1) : nullptr);
      filter_.analyse(line, frequencies, 2 * row_.padded);
    });
  }

  // The filtered experts back into dhidden [rows, 3d+3].
  void split(const Block& block, const Matrix& dhidden) {
    for_lines(block, [&](int64_t i, float* frequencies, float* line) {
      filter_.synthesise(frequencies, line, 2 * row_.padded);
      typed_.split(row_, dhidden.data + i * row_bytes_, line);
    });
  }

  // Sums [3d+4] of the lines of some samples; float32 would lose what they share.
  std::vector<double> total(const std::vector<float>& sums, int64_t first, int64_t count) const {
    const int64_t width = shape_.hidden + 1;
    std::vector<double> result(width, 0.0);
    for (int64_t line = first * filter_.height; line < (first + count) * filter_.height; ++line)
      for (int64_t i = 0; i < width; ++i) result[i] += sums[line * width + i];
    return result;
  }

  void release() { frequencies_ = nothing(ScalarType::Float); }

  std::vector<float> sums() const {
    return std::vector<float>(shape_.samples * filter_.height * (shape_.hidden + 1), 0.0f);
  }

 private:
  float* at(int64_t line) {
    return static_cast<float*>(frequencies_.data_ptr()) + line * filter_.kept_columns * 2 * row_.padded;
  }

  template <typename Body>
  void for_lines(const Block& block, const Body& body) {
    // zero, so that the padding behind each row of a line stays zero
    std::vector<float> line = scratch(filter_.width * 2 * row_.padded);
    for (int64_t i = 0; i < block.rows / row_.columns; ++i) body(i, at(block.first / row_.columns + i), line.data());
  }

  const GridFilter& filter_;
  const TypedLoops& typed_;
  Shape shape_;
  RowShape row_;
  int64_t row_bytes_;
  Tensor frequencies_;
  std::vector<int64_t> on_;
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
  check_weight(op, "down_bias", down_bias, shape.dtype, shape.stacked, {3, shape.width});
  check_weight(op, "router_bias", router_bias, shape.dtype, shape.stacked, {3});
  const auto runs = runs_of(op, adapters, shape.samples, shape.stacked);
  x = dense(x), down = dense(down), down_bias = dense(down_bias), up = dense(up);
  up_bias = dense(up_bias), router = dense(router), router_bias = dense(router_bias);
  scale = dense(scale);

  const Tensor y = empty_as(x), active = empty({shape.samples, shape.tokens, shape.hidden}, shape.dtype);
  const Rows all_x = matrix_of(x, shape.rows(), shape.channels), all_y = matrix_of(y, shape.rows(), shape.channels);
  const Rows hidden = matrix_of(active, shape.rows(), shape.hidden);
  WeightsOfAdapters weights(runs, shape, down, up, up_bias, router, scale);
  weights.for_each([&](Weights& own, int64_t adapter) { own.add_biases(down_bias, router_bias, adapter); });
  Bands bands(filter, shape, runs);

  RowPass enters(runs, shape.tokens, shape.dtype, filter.width);
  enters.product({.out = hidden.column_range(0, 3 * shape.width), .a = all_x, .b = weights.weight(down_transposed)});
  enters.loop([&](const Block& block) {
    project_last(shape, block.of(hidden), block.of(all_x), weights.of(block.adapter).router());
    bands.analyse(block, block.of(hidden));
  });
  enters.run();
  bands.filter_rows();

  RowPass leaves(runs, shape.tokens, shape.dtype, filter.width);
  const Rows mixed = leaves.temporary(shape.hidden);
  leaves.loop([&](const Block& block) {
    bands.mix(block, block.of(hidden), block.of(mixed), weights.of(block.adapter).bias());
  });
  leaves.product(
      {.out = all_y, .a = mixed, .b = weights.weight(leave_transposed), .alpha = weights.scale(), .base = all_x});
  leaves.off([&](const Block& block) {
    copy(block.of(all_y), block.of(all_x));
    const Matrix unused = block.of(hidden);
    std::memset(unused.data, 0, unused.rows * unused.columns * bytes_of(unused.dtype));
  });
  leaves.run();
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

  const ScalarType dtype = shape.dtype;
  const int64_t size = bytes_of(dtype), c = shape.channels, d = shape.width, a = shape.adapters();
  const Tensor dx = wants_x ? empty_as(x) : nothing(dtype);
  Tensor dhidden = empty({shape.samples, shape.tokens, shape.hidden}, dtype);
  Tensor mixed = wants_weights ? empty_as(dhidden) : nothing(dtype);
  const Rows all_dy = matrix_of(dy, shape.rows(), c), all_x = matrix_of(x, shape.rows(), c);
  const Rows all_dx = matrix_of(dx, shape.rows(), c), kept = matrix_of(active, shape.rows(), shape.hidden);
  const Rows gradient = matrix_of(dhidden, shape.rows(), shape.hidden);
  const Rows code = matrix_of(mixed, shape.rows(), shape.hidden);
  WeightsOfAdapters weights(runs, shape, down, up, up_bias, router, scale);
  Bands bands(filter, shape, runs);
  std::vector<float> line_sums = wants_weights ? bands.sums() : std::vector<float>();

  RowPass enters(runs, shape.tokens, dtype, filter.width);
  enters.product({.out = gradient.column_range(0, 3 * d), .a = all_dy, .b = weights.weight(leave_experts)});
  enters.loop([&](const Block& block) {
    Weights& own = weights.of(block.adapter);
    const Matrix dmixed = block.of(gradient);
    project_last(shape, dmixed, block.of(all_dy), own.up_bias());
    bands.unmix(
        block, dmixed, block.of(kept), wants_weights ? block.of(code).data : nullptr, own.scale, line_sums.data());
  });
  enters.run();
  bands.filter_rows();

  if (wants_x) weights.for_each([](Weights& own, int64_t) { own.add_enter(); });
  RowPass leaves(runs, shape.tokens, dtype, filter.width);
  leaves.loop([&](const Block& block) { bands.split(block, block.of(gradient)); });
  if (wants_x) leaves.product({.out = all_dx, .a = gradient, .b = weights.weight(enter), .base = all_dy});
  leaves.off([&](const Block& block) {
    if (wants_x) copy(block.of(all_dx), block.of(all_dy));
  });
  leaves.run();
  if (!wants_weights) {
    return {dx, nothing(dtype), nothing(dtype), nothing(dtype), nothing(dtype), nothing(dtype), nothing(dtype),
            nothing(dtype)};
  }

  // what is not needed any more goes before the gradients come
  const Factor scales = weights.scale();
  weights.release(), bands.release();
  // gradients of the packed weights: enter [A, 3d+3, C], leave [A, C, 3d+3]
  const Tensor denter = empty({a, shape.hidden, c}, dtype), dleave = empty({a, c, shape.hidden}, dtype);
  TokenSums sums(runs, shape.tokens, dtype, a);
  sums.product(weight_of(denter, shape.hidden, c), gradient, all_x);
  sums.product(weight_of(dleave, c, shape.hidden), all_dy, code, scales);
  sums.run();
  dhidden = nothing(dtype), mixed = nothing(dtype);
  std::vector<float> dbias(a * (shape.hidden + 1), 0.0f);
  for (const Run& run : runs) {
    if (run.adapter < 0) continue;
    const std::vector<double> total = bands.total(line_sums, run.first, run.count);
    for (int64_t i = 0; i <= shape.hidden; ++i) dbias[run.adapter * (shape.hidden + 1) + i] += total[i];
  }

  const Tensor ddown = empty_as(down), dup = empty_as(up), dup_bias = empty_as(up_bias), drouter = empty_as(router);
  const Tensor dscale = empty_as(scale);
  const bool stacked = shape.stacked >= 0;
  const Tensor ddown_bias = stacked ? empty({a, 3, d}, dtype) : empty({3, d}, dtype);
  const Tensor drouter_bias = stacked ? empty({a, 3}, dtype) : empty({3}, dtype);
  auto move = [size](char* target, int64_t to, const char* source, int64_t from, int64_t count) {
    if (count) std::memcpy(target + to * size, source + from * size, count * size);
  };
  char *to_down = data_of(ddown), *to_up = data_of(dup), *to_up_bias = data_of(dup_bias), *to_router = data_of(drouter);
  const char *from_enter = data_of(denter), *from_leave = data_of(dleave);
  const TypedLoops& typed = loops_of(dtype);
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> frequency_adapter_factors(
    Tensor x, Tensor dy, Tensor down, Tensor down_bias, Tensor up, Tensor up_bias, Tensor router, Tensor router_bias,
    Tensor scale, Tensor rows, Tensor columns, Tensor row_weights, Tensor column_weights, bool coupled) {
  const char* op = "frequency_adapter_factors";
  const GridFilter filter(op, rows, columns, row_weights, column_weights, coupled);
  const Shape shape = check_shapes(op, x, filter, down, up, up_bias, router, scale, {});
  check(shape.stacked < 0, op, ": down has shape ", shape_of(down), ", expected [3, d, C]");
  check_weight(op, "down_bias", down_bias, shape.dtype, shape.stacked, {3, shape.width});
  check_weight(op, "router_bias", router_bias, shape.dtype, shape.stacked, {3});
  check_tensor(op, "dy", dy, shape.dtype, {shape.samples, shape.tokens, shape.channels});
  const auto runs = runs_of(op, {}, shape.samples, shape.stacked);
  x = dense(x), dy = dense(dy), down = dense(down), down_bias = dense(down_bias), up = dense(up);
  up_bias = dense(up_bias), router = dense(router), router_bias = dense(router_bias), scale = dense(scale);

  const ScalarType dtype = shape.dtype;
  const int64_t d = shape.width;
  const Tensor dx = empty_as(x), dhidden = empty({shape.samples, shape.tokens, shape.hidden}, dtype);
  const Tensor mixed = empty_as(dhidden), active = empty_as(dhidden);
  const Rows all_x = matrix_of(x, shape.rows(), shape.channels), all_dy = matrix_of(dy, shape.rows(), shape.channels);
  const Rows all_dx = matrix_of(dx, shape.rows(), shape.channels), hidden = matrix_of(active, shape.rows(), shape.hidden);
  const Rows gradient = matrix_of(dhidden, shape.rows(), shape.hidden), code = matrix_of(mixed, shape.rows(), shape.hidden);
  WeightsOfAdapters weights(runs, shape, down, up, up_bias, router, scale);
  weights.for_each([&](Weights& own, int64_t adapter) {
    own.add_biases(down_bias, router_bias, adapter);
    own.add_enter();
  });
  Bands bands(filter, shape, runs);
  std::vector<float> line_sums = bands.sums();

  RowPass enters(runs, shape.tokens, dtype, filter.width);
  enters.product({.out = hidden.column_range(0, 3 * d), .a = all_x, .b = weights.weight(down_transposed)});
  enters.loop([&](const Block& block) {
    project_last(shape, block.of(hidden), block.of(all_x), weights.of(block.adapter).router());
    bands.analyse(block, block.of(hidden));
  });
  enters.run();
  bands.filter_rows();

  RowPass turns(runs, shape.tokens, dtype, filter.width);
  turns.product({.out = gradient.column_range(0, 3 * d), .a = all_dy, .b = weights.weight(leave_experts)});
  turns.loop([&](const Block& block) {
    Weights& own = weights.of(block.adapter);
    const Matrix dmixed = block.of(gradient), product = block.of(code);
    bands.mix(block, block.of(hidden), product, own.bias());
    project_last(shape, dmixed, block.of(all_dy), own.up_bias());
    bands.unmix(block, dmixed, block.of(hidden), product.data, own.scale, line_sums.data());
    loops_of(dtype).scale(product.data, own.scale, product.rows * product.columns);
  });
  turns.run();
  bands.filter_rows();

  RowPass leaves(runs, shape.tokens, dtype, filter.width);
  leaves.loop([&](const Block& block) { bands.split(block, block.of(gradient)); });
  leaves.product({.out = all_dx, .a = gradient, .b = weights.weight(enter)});
  leaves.run();

  const Tensor dbias = empty({shape.samples, shape.hidden}, ScalarType::Float);
  const Tensor dscale = empty({shape.samples}, ScalarType::Float);
  for (int64_t b = 0; b < shape.samples; ++b) {
    const std::vector<double> total = bands.total(line_sums, b, 1);
    std::copy(total.begin(), total.end() - 1, static_cast<float*>(dbias.data_ptr()) + b * shape.hidden);
    static_cast<float*>(dscale.data_ptr())[b] = static_cast<float>(total.back());
  }
  return {dx, dhidden, mixed, dbias, dscale};
}

}  // namespace cegate
