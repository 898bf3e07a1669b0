#include "products.h"

#include "tiles.h"

namespace cegate {
namespace {

constexpr int64_t kDepth = 256;      // of a block: its panel stays in the first-level cache
constexpr int64_t kRowsOfBlock = 96;  // of a: such a block of rows stays in the second-level cache
constexpr int64_t kWorth = 1 << 19;  // multiplications that are worth waking a thread for

int64_t blocks_of(int64_t count, int64_t block) { return (count + block - 1) / block; }

float* element(const Matrix& m, int64_t row, int64_t column) {
  return reinterpret_cast<float*>(m.data) + row * m.row_stride + column * m.column_stride;
}

// out = (base) + alpha * a b. Every element is summed over blocks of kDepth in order, whatever the number of threads.
struct Product {
  const Matrix& out;
  const Matrix* base;  // null: nothing
  const Matrix& a;
  const Matrix& b;
  float alpha;
  const Tiles& set = *tiles();

  int64_t depth() const { return a.columns; }
  int64_t depth_blocks() const { return std::max<int64_t>(blocks_of(depth(), kDepth), 1); }  // none still writes out

  // The tile at a row and column, in a block of the depth, with the panel of both.
  void tile(int64_t row, int64_t column, int64_t depth_block, const float* panel) const {
    const int64_t from = depth_block * kDepth;
    const Matrix* start = depth_block ? &out : base;
    set.multiply({
        .a = element(a, row, from), .a_row = a.row_stride, .a_column = a.column_stride,
        .panel = panel, .depth = std::min(kDepth, depth() - from),
        .base = start ? element(*start, row, column) : nullptr,
        .base_row = start ? start->row_stride : 0, .base_column = start ? start->column_stride : 1,
        .out = element(out, row, column), .out_row = out.row_stride, .out_column = out.column_stride,
        .rows = std::min(set.rows, out.rows - row), .columns = std::min(set.columns, out.columns - column),
        .alpha = alpha, .adds = start != nullptr});
  }

  void pack(float* panel, int64_t column, int64_t depth_block) const {
    const int64_t from = depth_block * kDepth;
    set.pack(
        panel, element(b, from, column), b.row_stride, b.column_stride, std::min(kDepth, depth() - from),
        std::min(set.columns, b.columns - column));
  }
};

// b is a weight, small beside a: packed whole, then blocks of a's rows, each with all panels.
void by_rows(const Product& product) {
  const Tiles& set = product.set;
  const int64_t panels = blocks_of(product.out.columns, set.columns), depth_blocks = product.depth_blocks();
  const int64_t row_tiles = blocks_of(product.out.rows, set.rows);
  const int64_t stride = std::min(kDepth, product.depth()) * set.columns;
  const Tensor packed = empty({depth_blocks * panels * stride}, ScalarType::Float);
  float* memory = static_cast<float*>(packed.data_ptr());
  torch::stable::parallel_for(
      0, depth_blocks * panels, std::max<int64_t>(kWorth / 8 / std::max<int64_t>(stride, 1), 1),
      [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) product.pack(memory + i * stride, i % panels * set.columns, i / panels);
      });
  const int64_t tile_work = set.rows * product.out.columns * std::max<int64_t>(product.depth(), 1);
  torch::stable::parallel_for(0, row_tiles, std::max<int64_t>(kWorth / tile_work, 1), [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * set.rows; first < end * set.rows; first += kRowsOfBlock) {
      const int64_t last = std::min({first + kRowsOfBlock, end * set.rows, product.out.rows});
      for (int64_t k = 0; k < depth_blocks; ++k)
        for (int64_t j = 0; j < panels; ++j)
          for (int64_t i = first; i < last; i += set.rows)
            product.tile(i, j * set.columns, k, memory + (k * panels + j) * stride);
    }
  });
}

// a is narrow and the depth is long, as in a weight's gradient: panels of b, each packed where it is used.
void by_columns(const Product& product) {
  const Tiles& set = product.set;
  const int64_t panels = blocks_of(product.out.columns, set.columns), depth_blocks = product.depth_blocks();
  const int64_t panel_work = product.out.rows * set.columns * std::max<int64_t>(product.depth(), 1);
  torch::stable::parallel_for(0, panels, std::max<int64_t>(kWorth / panel_work, 1), [&](int64_t begin, int64_t end) {
    const Tensor scratch = empty({std::min(kDepth, product.depth()) * set.columns}, ScalarType::Float);
    float* panel = static_cast<float*>(scratch.data_ptr());
    for (int64_t j = begin; j < end; ++j) {
      for (int64_t k = 0; k < depth_blocks; ++k) {
        product.pack(panel, j * set.columns, k);
        for (int64_t i = 0; i < product.out.rows; i += set.rows) product.tile(i, j * set.columns, k, panel);
      }
    }
  });
}

void multiply_single(const Matrix& out, const Matrix* base, const Matrix& a, const Matrix& b, float alpha) {
  // a b^T summed over tokens: both lie token by token
  const bool over_tokens = a.row_stride == 1 && b.column_stride == 1 && a.columns > a.rows;
  if (!over_tokens) return by_rows({out, base, a, b, alpha});
  if (out.rows <= out.columns) return by_columns({out, base, a, b, alpha});
  const Matrix turned = out.transposed(), turned_base = base ? base->transposed() : turned;
  by_columns({turned, base ? &turned_base : nullptr, b.transposed(), a.transposed(), alpha});
}

Tensor view_of(const Matrix& m) {
  const int64_t sizes[] = {m.rows, m.columns}, strides[] = {m.row_stride, m.column_stride};
  return torch::stable::from_blob(
      m.data, torch::headeronly::IntHeaderOnlyArrayRef(sizes, 2), torch::headeronly::IntHeaderOnlyArrayRef(strides, 2),
      torch::stable::Device(torch::headeronly::DeviceType::CPU), m.dtype);
}

void multiply_by_aten(const Matrix& out, const Matrix* base, const Matrix& a, const Matrix& b, double alpha) {
  const Tensor target = view_of(out), left = view_of(a), right = view_of(b);
  if (alpha == 1 && !base) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(target.get(), left.get(), right.get()));
    return;
  }
  const Tensor start = view_of(base ? *base : out);
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(target.get(), start.get(), left.get(), right.get(), base ? 1.0 : 0.0, alpha));
}

void multiply(const Matrix& out, const Matrix* base, const Matrix& a, const Matrix& b, double alpha) {
  if (out.rows == 0 || out.columns == 0) return;
  if (out.dtype == ScalarType::Float && tiles()) multiply_single(out, base, a, b, static_cast<float>(alpha));
  else multiply_by_aten(out, base, a, b, alpha);
}

}  // namespace

void multiply(const Matrix& out, const Matrix& a, const Matrix& b, double alpha, double beta) {
  multiply(out, beta == 0 ? nullptr : &out, a, b, alpha);
}

void multiply_add(const Matrix& out, const Matrix& base, const Matrix& a, const Matrix& b, double alpha) {
  multiply(out, &base, a, b, alpha);
}

}  // namespace cegate
