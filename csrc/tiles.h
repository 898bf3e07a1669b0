// Tiles of float32 matrix products. No torch here: tiles.cpp is compiled for AVX2 and AVX-512, like loops.cpp.
#pragma once

#include <cstdint>

namespace cegate {

// out = base + alpha * (a b + bias) for the columns of one panel. All strides are in elements.
struct Tile {
  const float* a;  // [rows, depth], any strides: its elements are broadcast
  int64_t a_row, a_column;
  const float* panel;  // [depth, Tiles::columns], a block of b as `pack` writes it
  int64_t depth;
  const float* base;  // [rows, columns], or null: zero
  int64_t base_row;
  const float* bias;  // [columns], or null: zero
  float* out;         // [rows, columns]
  int64_t out_row;
  int64_t rows, columns;  // columns: at most Tiles::columns
  float alpha;
};

constexpr int64_t kMostColumns = 32;  // of a panel, whatever the instruction set

struct Tiles {
  int64_t rows, columns;  // that the registers hold at once; more rows go through them in turn

  // panel [depth, Tiles::columns] = b [depth, count] of any strides, zero behind the last column.
  void (*pack)(float* panel, const float* b, int64_t row_stride, int64_t column_stride, int64_t depth, int64_t count);
  void (*multiply)(const Tile& tile);

  // out [rows, count] of any strides = alpha * source [rows, Tiles::columns].
  void (*place)(
      float* out, int64_t out_row, int64_t out_column, const float* source, int64_t rows, int64_t count, float alpha);
};

// Those of the instruction set that loops() runs with; null for the portable one, where a BLAS is faster.
const Tiles* tiles();

}  // namespace cegate
