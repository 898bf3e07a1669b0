// Compiled once per instruction set (CEGATE_ISA, CEGATE_LANES), as loops.cpp is; all but the table has internal linkage.
// With CEGATE_PAIRS for bfloat16 through AVX512-BF16, which multiplies pairs of neighbours along the depth and adds both
// products to a float32.
#include "tiles.h"

#include "vectors.h"

#ifdef CEGATE_PAIRS
#include <immintrin.h>
#endif

namespace cegate {
namespace {

// A panel holds words of 32 bits, in vectors that are called floats: one element, or a pair.
#ifdef CEGATE_PAIRS
using Element = Bfloat16;

inline Vector load_row(const Bfloat16* row, int64_t row_stride, int64_t left, int64_t count) {
  const Halves low = load_halves(row, count), high = left > 1 ? load_halves(row + row_stride, count) : Halves{};
  return bits_of(__builtin_convertvector(low, Words) | __builtin_convertvector(high, Words) << 16);
}

inline Vector load_column(const Bfloat16* column, int64_t left) {
  Vector result = splat(0.0f);
  if (left == 2 * kLanes) memcpy(&result, column, sizeof(result));
  else memcpy(&result, column, 2 * left);
  return result;
}

inline Vector broadcast(const Bfloat16* a) {
  uint32_t word;
  memcpy(&word, a, sizeof(word));
  return bits_of(word - Words{});
}

inline Vector broadcast_last(const Bfloat16* a) { return bits_of(uint32_t{a->bits} - Words{}); }

inline void multiply_add(Vector& total, Vector a, Vector b) { total = _mm512_dpbf16_ps(total, (__m512bh)a, (__m512bh)b); }

constexpr int64_t kUnit = 2, kDepth = 1024;
#else
using Element = float;

inline Vector load_row(const float* row, int64_t, int64_t, int64_t count) { return load_lanes(row, count); }
inline Vector load_column(const float* column, int64_t left) { return load_lanes(column, left); }
inline Vector broadcast(const float* a) { return splat(*a); }
inline Vector broadcast_last(const float* a) { return splat(*a); }
inline void multiply_add(Vector& total, Vector a, Vector b) { total += a * b; }

constexpr int64_t kUnit = 1, kDepth = 256;
#endif

inline int64_t words_in(int64_t depth) { return (depth + kUnit - 1) / kUnit; }

// 16 accumulators of 32 registers, or 12 of 16: the rest holds a row of the panel and a broadcast word.
constexpr int kRows = kLanes == 16 ? 8 : 4;
constexpr int kVectors = kLanes == 16 ? 2 : 3;
constexpr int64_t kColumns = kVectors * kLanes;
static_assert(kColumns <= kMostColumns && kDepth * kColumns * sizeof(Element) <= kMostPanelBytes);

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

struct Yes {
  constexpr operator bool() const { return true; }
};
struct No {
  constexpr operator bool() const { return false; }
};

// Rows load(i, whole) of a block become its columns store(i, row, whole); a whole block stays in registers.
template <typename Load, typename Store>
inline void transpose(bool whole, int64_t rows, int64_t columns, Load load, Store store) {
  Vector block[kLanes];
  if (whole) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) block[i] = load(i, Yes());
    transpose_by<1>(block);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(i, block[i], Yes());
    return;
  }
  for (int i = 0; i < kLanes; ++i) block[i] = i < rows ? load(i, No()) : splat(0.0f);
  transpose_by<1>(block);
  for (int i = 0; i < columns; ++i) store(i, block[i], No());
}

// Words of b whose columns are dense, as in the transpose of a weight; what lies behind the last one is zero already.
inline void pack_columns(float* panel, const Element* b, int64_t column_stride, int64_t depth, int64_t count) {
  constexpr int64_t kHeight = kLanes * kUnit;
  for (int64_t j = 0; j < count; j += kLanes) {
    for (int64_t k = 0; k < depth; k += kHeight) {
      float* target = panel + k / kUnit * kColumns + j;
      const Element* source = b + j * column_stride + k;
      const int64_t columns = lanes_left(j, count), left = depth - k < kHeight ? depth - k : kHeight;
      transpose(
          columns == kLanes && left == kHeight, columns, words_in(left),
          [&](int i, auto whole) { return load_column(source + i * column_stride, whole ? kHeight : left); },
          [&](int i, Vector row, auto whole) { store_lanes(target + i * kColumns, row, whole ? kLanes : columns); });
    }
  }
}

void pack(
    void* panel_memory, const void* b_memory, int64_t row_stride, int64_t column_stride, int64_t depth, int64_t count) {
  float* panel = static_cast<float*>(panel_memory);
  const Element* b = static_cast<const Element*>(b_memory);
  const int64_t words = words_in(depth);
  const Vector zero = splat(0.0f);
  for (int64_t k = 0; k < words; ++k)
    for (int64_t j = count / kLanes * kLanes; j < kColumns; j += kLanes) store_vector(panel + k * kColumns + j, zero);
  if (column_stride == 1) {
    for (int64_t k = 0; k < words; ++k) {
      const Element* row = b + k * kUnit * row_stride;
      for (int64_t j = 0; j < count; j += kLanes)
        store_vector(panel + k * kColumns + j, load_row(row + j, row_stride, depth - k * kUnit, lanes_left(j, count)));
    }
  } else if (row_stride == 1) {
    pack_columns(panel, b, column_stride, depth, count);
  } else {
    Element* elements = static_cast<Element*>(panel_memory);
    for (int64_t k = 0; k < words * kUnit; ++k)
      for (int64_t j = 0; j < count; ++j)
        elements[(k / kUnit * kColumns + j) * kUnit + k % kUnit] =
            k < depth ? b[k * row_stride + j * column_stride] : Element{};
  }
}

// Rows of out from `first` on; `whole`: all of kRows and of the vectors.
template <typename Out, int vectors, bool whole>
inline void multiply_rows(const Tile& t, int64_t first) {
  const int64_t rows = whole ? kRows : t.rows - first;
  const Element* row[kRows];  // a tile that is not full reads its last row again
  for (int i = 0; i < kRows; ++i) row[i] = static_cast<const Element*>(t.a) + (first + (i < rows ? i : rows - 1)) * t.a_row;
  const Out* base = t.base ? static_cast<const Out*>(t.base) + first * t.base_row : nullptr;
  Out* out = static_cast<Out*>(t.out) + first * t.out_row;
  // unrolled, or the accumulators would live in memory
  Vector total[kRows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) total[i][v] = splat(0.0f);
  // the next rows of out and base lie far away, where no hardware looks for them: 1.5 times as fast on cold memory
  const int64_t next = first + kRows < t.rows ? kRows : 0;
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) {
      if (base) __builtin_prefetch(base + (next + i) * t.base_row + v * kLanes);
      if (out != base) __builtin_prefetch(out + (next + i) * t.out_row + v * kLanes, 1);
    }
  }
  const float* panel = static_cast<const float*>(t.panel);
  int64_t at = 0;
  auto step = [&](auto broadcast_of) {
    Vector value[vectors];
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) value[v] = load_vector(panel + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vector weight = broadcast_of(row[i] + at);
#pragma GCC unroll 3
      for (int v = 0; v < vectors; ++v) multiply_add(total[i][v], weight, value[v]);
    }
    panel += kColumns, at += t.a_step;
  };
  for (const float* end = panel + t.depth / kUnit * kColumns; panel < end;)
    step([](const Element* a) { return broadcast(a); });
  if (t.depth % kUnit) step([](const Element* a) { return broadcast_last(a); });

  const Vector alpha = splat(t.alpha);
  const float* start = t.start ? t.start + first * kColumns : nullptr;  // added last: shorter sums round less
  auto columns_of = [&](int v) { return whole ? kLanes : lanes_left(v * kLanes, t.columns); };
  Vector bias[vectors];
#pragma GCC unroll 3
  for (int v = 0; v < vectors; ++v)
    bias[v] = t.bias ? load_lanes(static_cast<const Element*>(t.bias) + v * kLanes, columns_of(v)) : splat(0.0f);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    if (i >= rows) break;
#pragma GCC unroll 3
    for (int v = 0; v < vectors; ++v) {
      if (start) total[i][v] += load_vector(start + i * kColumns + v * kLanes);
      Vector result = alpha * (total[i][v] + bias[v]);
      asm("" : "+v"(result));  // one rounding more, the same in whole tiles and others: never fused with the sum below
      if (base) result += load_lanes(base + i * t.base_row + v * kLanes, columns_of(v));
      store_lanes(out + i * t.out_row + v * kLanes, result, columns_of(v));
    }
  }
}

template <typename Out, int vectors>
void multiply_by(const Tile& t) {
  int64_t first = 0;
  if (t.columns == vectors * kLanes)
    for (; first + kRows <= t.rows; first += kRows) multiply_rows<Out, vectors, true>(t, first);
  for (; first < t.rows; first += kRows) multiply_rows<Out, vectors, false>(t, first);
}

template <typename Out>
void multiply(const Tile& tile) {
  if (tile.columns > 2 * kLanes) return multiply_by<Out, kVectors>(tile);
  if (tile.columns > kLanes) return multiply_by<Out, 2>(tile);
  return multiply_by<Out, 1>(tile);
}

void place(
    void* out_memory, int64_t out_row, int64_t out_column, const float* source, int64_t rows, int64_t count, float alpha) {
  Element* out = static_cast<Element*>(out_memory);
  if (out_column == 1) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < count; j += kLanes)
        store_lanes(out + i * out_row + j, splat(alpha) * load_vector(source + i * kColumns + j), lanes_left(j, count));
    return;
  }
  if (out_row == 1) {
    for (int64_t i = 0; i < rows; i += kLanes) {
      for (int64_t j = 0; j < count; j += kLanes) {
        const int64_t height = lanes_left(i, rows), columns = lanes_left(j, count);
        transpose(
            height == kLanes && columns == kLanes, height, columns,
            [&](int k, auto) { return splat(alpha) * load_vector(source + (i + k) * kColumns + j); },
            [&](int k, Vector row, auto whole) {
              store_lanes(out + i + (j + k) * out_column, row, whole ? kLanes : height);
            });
      }
    }
    return;
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < count; ++j) assign(out[i * out_row + j * out_column], alpha * source[i * kColumns + j]);
}

}  // namespace

extern const Tiles CEGATE_TABLE(tiles);
const Tiles CEGATE_TABLE(tiles) = {kRows, kColumns, kUnit, kDepth, pack, multiply<Element>, multiply<float>, place};

}  // namespace cegate
