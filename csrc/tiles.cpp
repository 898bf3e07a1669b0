// Compiled once per instruction set (CEGATE_ISA, CEGATE_LANES), as loops.cpp is; all but the table has internal linkage.
#include "tiles.h"

#include "vectors.h"

namespace cegate {
namespace {

// 16 accumulators of 32 registers, or 12 of 16: the rest holds a row of the panel and a broadcast element.
constexpr int kRows = kLanes == 16 ? 8 : 4;
constexpr int kVectors = kLanes == 16 ? 2 : 3;
constexpr int64_t kColumns = kVectors * kLanes;

// kLanes x kLanes elements, transposed in registers: every step swaps halves of pairs of vectors.
inline void transpose(Vector block[kLanes]) {
  for (int64_t step = 1; step < kLanes; step *= 2) {
    Integers low, high;
    for (int64_t i = 0; i < kLanes; ++i) {
      low[i] = static_cast<int32_t>(i & step ? kLanes + i - step : i);
      high[i] = static_cast<int32_t>(i & step ? kLanes + i : i + step);
    }
    for (int64_t i = 0; i < kLanes; ++i) {
      if (i & step) continue;
      const Vector first = block[i], second = block[i + step];
      block[i] = shuffle(first, second, low);
      block[i + step] = shuffle(first, second, high);
    }
  }
}

// Columns of b that are dense, as in the transpose of a weight.
void pack_columns(float* panel, const float* b, int64_t column_stride, int64_t depth, int64_t count) {
  for (int64_t j = 0; j < count; j += kLanes) {
    const int64_t columns = lanes_left(j, count);
    for (int64_t k = 0; k < depth; k += kLanes) {
      const int64_t rows = lanes_left(k, depth);
      Vector block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i)
        block[i] = i < columns ? load_lanes(b + (j + i) * column_stride + k, rows) : splat(0.0f);
      transpose(block);
      for (int64_t i = 0; i < rows; ++i) store_vector(panel + (k + i) * kColumns + j, block[i]);
    }
  }
}

void pack(float* panel, const float* b, int64_t row_stride, int64_t column_stride, int64_t depth, int64_t count) {
  const Vector zero = splat(0.0f);
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t j = (count + kLanes - 1) / kLanes * kLanes; j < kColumns; j += kLanes)
      store_vector(panel + k * kColumns + j, zero);
  if (column_stride == 1) {
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t j = 0; j < count; j += kLanes)
        store_vector(panel + k * kColumns + j, load_lanes(b + k * row_stride + j, lanes_left(j, count)));
  } else if (row_stride == 1) {
    pack_columns(panel, b, column_stride, depth, count);
  } else {
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t j = 0; j < kColumns; ++j)
        panel[k * kColumns + j] = j < count ? b[k * row_stride + j * column_stride] : 0.0f;
  }
}

template <int vectors>
void multiply_by(const Tile& t) {
  const float* row[kRows];  // a tile that is not full reads its last row again
  for (int i = 0; i < kRows; ++i) row[i] = t.a + (i < t.rows ? i : t.rows - 1) * t.a_row;
  // unrolled, or the accumulators would live in memory
  Vector total[kRows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) total[i][v] = splat(0.0f);
  int64_t at = 0;
  for (const float *panel = t.panel, *end = t.panel + t.depth * kColumns; panel < end; panel += kColumns) {
    Vector value[vectors];
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) value[v] = load_vector(panel + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vector weight = splat(row[i][at]);
#pragma GCC unroll 3
      for (int v = 0; v < vectors; ++v) total[i][v] += weight * value[v];
    }
    at += t.a_column;
  }

  const Vector alpha = splat(t.alpha);
  Vector bias[vectors];
  for (int v = 0; v < vectors; ++v)
    bias[v] = t.bias ? load_lanes(t.bias + v * kLanes, lanes_left(v * kLanes, t.columns)) : splat(0.0f);
  for (int i = 0; i < kRows && i < t.rows; ++i) {
    for (int v = 0; v < vectors; ++v) {
      const int64_t column = v * kLanes, count = lanes_left(column, t.columns);
      Vector result = alpha * (total[i][v] + bias[v]);
      if (t.base) result += load_lanes(t.base + i * t.base_row + column, count);
      store_lanes(t.out + i * t.out_row + column, result, count);
    }
  }
}

void multiply(const Tile& tile) {
  if (tile.columns > 2 * kLanes) return multiply_by<kVectors>(tile);
  if (tile.columns > kLanes) return multiply_by<2>(tile);
  return multiply_by<1>(tile);
}

void place(
    float* out, int64_t out_row, int64_t out_column, const float* source, int64_t rows, int64_t count, float alpha) {
  if (out_column == 1) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < count; j += kLanes)
        store_lanes(out + i * out_row + j, splat(alpha) * load_vector(source + i * kColumns + j), lanes_left(j, count));
    return;
  }
  for (int64_t i = 0; i < rows; i += kLanes) {
    const int64_t height = lanes_left(i, rows);
    for (int64_t j = 0; j < count; j += kLanes) {
      Vector block[kLanes];
      for (int64_t k = 0; k < kLanes; ++k)
        block[k] = k < height ? splat(alpha) * load_vector(source + (i + k) * kColumns + j) : splat(0.0f);
      transpose(block);
      for (int64_t k = 0; k < lanes_left(j, count); ++k) {
        if (out_row == 1) {
          store_lanes(out + i + (j + k) * out_column, block[k], height);
          continue;
        }
        for (int64_t l = 0; l < height; ++l) out[(i + l) * out_row + (j + k) * out_column] = block[k][l];
      }
    }
  }
}

}  // namespace

extern const Tiles CEGATE_TABLE(tiles);
const Tiles CEGATE_TABLE(tiles) = {kRows, kColumns, pack, multiply, place};

}  // namespace cegate
