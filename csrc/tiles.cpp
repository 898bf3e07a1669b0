// Compiled once per instruction set (CEGATE_ISA, CEGATE_LANES), as loops.cpp is; all but the table has internal linkage.
#include "tiles.h"

#include "vectors.h"

namespace cegate {
namespace {

// 16 accumulators of 32 registers, or 12 of 16: the rest holds a row of the panel and a broadcast element.
constexpr int kRows = kLanes == 16 ? 8 : 4;
constexpr int kVectors = kLanes == 16 ? 2 : 3;
constexpr int64_t kColumns = kVectors * kLanes;
static_assert(kColumns <= kMostColumns);

// Every step swaps halves of pairs of vectors. A template, or the vectors would live in memory.
template <int step>
inline void transpose_by(Vector block[kLanes]) {
  if constexpr (step < kLanes) {
    Integers low, high;
    for (int i = 0; i < kLanes; ++i) {
      low[i] = i & step ? kLanes + i - step : i;
      high[i] = i & step ? kLanes + i : i + step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & step) continue;
      const Vector first = block[i], second = block[i + step];
      block[i] = shuffle(first, second, low);
      block[i + step] = shuffle(first, second, high);
    }
    transpose_by<2 * step>(block);
  }
}

// kLanes x kLanes elements, transposed in registers: target[k] [count] = column k of source [height].
inline void transpose(
    float* target, int64_t target_stride, const float* source, int64_t source_stride, int64_t height, int64_t count,
    float factor) {
  Vector block[kLanes];
  if (height == kLanes && count == kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) block[i] = splat(factor) * load_vector(source + i * source_stride);
    transpose_by<1>(block);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store_vector(target + i * target_stride, block[i]);
    return;
  }
  for (int i = 0; i < kLanes; ++i)
    block[i] = i < height ? splat(factor) * load_lanes(source + i * source_stride, count) : splat(0.0f);
  transpose_by<1>(block);
  for (int i = 0; i < count; ++i) store_lanes(target + i * target_stride, block[i], height);
}

// Columns of b that are dense, as in the transpose of a weight; what lies behind the last one is zero already.
void pack_columns(float* panel, const float* b, int64_t column_stride, int64_t depth, int64_t count) {
  for (int64_t j = 0; j < count; j += kLanes)
    for (int64_t k = 0; k < depth; k += kLanes)
      transpose(
          panel + k * kColumns + j, kColumns, b + j * column_stride + k, column_stride, lanes_left(j, count),
          lanes_left(k, depth), 1.0f);
}

void pack(float* panel, const float* b, int64_t row_stride, int64_t column_stride, int64_t depth, int64_t count) {
  const Vector zero = splat(0.0f);
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t j = count / kLanes * kLanes; j < kColumns; j += kLanes) store_vector(panel + k * kColumns + j, zero);
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

// Rows of out from `first` on; `whole`: all of kRows and of the vectors.
template <int vectors, bool whole>
inline void multiply_rows(const Tile& t, int64_t first) {
  const int64_t rows = whole ? kRows : t.rows - first;
  const float* row[kRows];  // a tile that is not full reads its last row again
  for (int i = 0; i < kRows; ++i) row[i] = t.a + (first + (i < rows ? i : rows - 1)) * t.a_row;
  // unrolled, or the accumulators would live in memory
  Vector total[kRows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) total[i][v] = splat(0.0f);
  // the next rows of out and base lie far away, where no hardware looks for them: 1.5 times as fast on cold memory
  const int64_t next = first + kRows < t.rows ? first + kRows : first;
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) {
      if (t.base) __builtin_prefetch(t.base + (next + i) * t.base_row + v * kLanes);
      if (t.out != t.base) __builtin_prefetch(t.out + (next + i) * t.out_row + v * kLanes, 1);
    }
  }
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
  const float* base = t.base ? t.base + first * t.base_row : nullptr;
  float* out = t.out + first * t.out_row;
  auto columns_of = [&](int v) { return whole ? kLanes : lanes_left(v * kLanes, t.columns); };
  Vector bias[vectors];
#pragma GCC unroll 3
  for (int v = 0; v < vectors; ++v) bias[v] = t.bias ? load_lanes(t.bias + v * kLanes, columns_of(v)) : splat(0.0f);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    if (i >= rows) break;
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) {
      Vector result = alpha * (total[i][v] + bias[v]);
      asm("" : "+v"(result));  // one rounding more, the same in whole tiles and others: never fused with the sum below
      if (base) result += load_lanes(base + i * t.base_row + v * kLanes, columns_of(v));
      store_lanes(out + i * t.out_row + v * kLanes, result, columns_of(v));
    }
  }
}

template <int vectors>
void multiply_by(const Tile& t) {
  int64_t first = 0;
  if (t.columns == vectors * kLanes)
    for (; first + kRows <= t.rows; first += kRows) multiply_rows<vectors, true>(t, first);
  for (; first < t.rows; first += kRows) multiply_rows<vectors, false>(t, first);
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
  if (out_row == 1) {
    for (int64_t i = 0; i < rows; i += kLanes)
      for (int64_t j = 0; j < count; j += kLanes)
        transpose(
            out + i + j * out_column, out_column, source + i * kColumns + j, kColumns, lanes_left(i, rows),
            lanes_left(j, count), alpha);
    return;
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < count; ++j) out[i * out_row + j * out_column] = alpha * source[i * kColumns + j];
}

}  // namespace

extern const Tiles CEGATE_TABLE(tiles);
const Tiles CEGATE_TABLE(tiles) = {kRows, kColumns, pack, multiply, place};

}  // namespace cegate
