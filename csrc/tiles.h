// Tiles of matrix products. No torch here: tiles.cpp is compiled once per instruction set, like loops.cpp.
#pragma once

#include <cstdint>

namespace cegate {

// Of a panel, whatever the instruction set.
constexpr int64_t kMostColumns = 32, kMostPanelBytes = 64 << 10;

// out = base + alpha * (start + a b + bias) for the columns of one panel. Strides are in elements; sums are float32.
struct Tile {
  const void* a;           // [rows, depth]: units of the depth lie dense
  int64_t a_row, a_step;   // from a row to the next, and from a unit of the depth to the next
  const void* panel;       // [depth, Tiles::columns], a block of b as `pack` writes it
  int64_t depth;
  const float* start;      // [rows, Tiles::columns], the sum over the depth before this block, or null: zero
  const void* base;        // [rows, columns], or null: zero
  int64_t base_row;
  const void* bias;        // [columns], or null: zero
  void* out;               // [rows, columns]
  int64_t out_row;
  int64_t rows, columns;   // columns: at most Tiles::columns
  float alpha;
};

// Of float32, or of bfloat16 where the processor multiplies pairs of it.
struct Tiles {
  int64_t rows, columns;  // that the registers hold at once; more rows go through them in turn
  int64_t unit;           // elements of the depth that are multiplied at once and lie side by side in a panel
  int64_t depth;          // of a block of a product: its panel stays in the first or second cache

  // panel [depth / unit, Tiles::columns, unit] = b [depth, count] of any strides, zero behind its last column and row.
  void (*pack)(void* panel, const void* b, int64_t row_stride, int64_t column_stride, int64_t depth, int64_t count);
  void (*multiply)(const Tile& tile);

  // The same with base and out of float32.
  void (*add_up)(const Tile& tile);

  // out [rows, count] of any strides = alpha * source [rows, Tiles::columns], which is float32.
  void (*place)(
      void* out, int64_t out_row, int64_t out_column, const float* source, int64_t rows, int64_t count, float alpha);
};

// Those for the CPU that loops() runs on; null where products are left to a BLAS: the portable loops, bfloat16 without
// pairs.
const Tiles* float32_tiles();
const Tiles* bfloat16_tiles();

}  // namespace cegate
