// The low-pass of a token grid, one axis after the other.
#pragma once

#include "tensors.h"

namespace cegate {

// A width in whole vectors of the loops.
inline int64_t padded(int64_t width) {
  const int64_t lanes = loops().lanes;
  return (width + lanes - 1) / lanes * lanes;
}

// The separable low-pass of an H x W grid in an orthonormal real basis: rows [K, H], columns [L, W], their weights [K], [L];
// `coupled`: the last two frequencies of both axes form the complex corner of the official band.
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

}  // namespace cegate
