// Tensors through LibTorch's stable ABI: views of memory, checks that name their values.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "loops.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name in torch 2.11
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace cegate {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The message is all that a user sees: no file name, no condition.
template <typename... Parts>
void check(bool good, const Parts&... parts) {
  if (good) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Written out only into a message: a check that holds costs no string.
struct ShapeOf {
  const Tensor& tensor;
};

inline ShapeOf shape_of(const Tensor& tensor) { return {tensor}; }

inline std::ostream& operator<<(std::ostream& text, const ShapeOf& shape) {
  text << '[';
  for (int64_t i = 0; i < shape.tensor.dim(); ++i) text << (i ? ", " : "") << shape.tensor.size(i);
  return text << ']';
}

struct ExpectedShape {
  const std::vector<int64_t>& sizes;
};

inline std::ostream& operator<<(std::ostream& text, const ExpectedShape& expected) {
  text << '[';
  for (size_t i = 0; i < expected.sizes.size(); ++i) {
    text << (i ? ", " : "");
    if (expected.sizes[i] < 0) text << '*';
    else text << expected.sizes[i];
  }
  return text << ']';
}

// Checks device, layout, dtype and shape; -1 in `shape` takes any size.
inline void check_tensor(
    const char* op, const char* name, const Tensor& tensor, ScalarType dtype, const std::vector<int64_t>& shape) {
  check(tensor.is_cpu(), op, ": ", name, " is not on the CPU");
  check(tensor.layout() == torch::headeronly::Layout::Strided, op, ": ", name, " is not a strided tensor");
  check(tensor.scalar_type() == dtype, op, ": ", name, " is ", toString(tensor.scalar_type()), ", expected ", toString(dtype));
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = shape[i] < 0 || tensor.size(i) == shape[i];
  check(same, op, ": ", name, " has shape ", shape_of(tensor), ", expected ", ExpectedShape{shape});
}

inline ScalarType check_dtype(const char* op, const char* name, const Tensor& tensor) {
  check(tensor.is_cpu(), op, ": ", name, " is not on the CPU");
  check(tensor.layout() == torch::headeronly::Layout::Strided, op, ": ", name, " is not a strided tensor");
  const ScalarType dtype = tensor.scalar_type();
  check(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op, ": ", name, " is ", toString(dtype),
      ", the C++ backend takes Float or BFloat16");
  return dtype;
}

// A weight [shape...], or [stacked, shape...] where the weights of several adapters lie one behind the other (stacked >= 0).
inline void check_weight(
    const char* op, const char* name, const Tensor& weight, ScalarType dtype, int64_t stacked,
    std::vector<int64_t> expected) {
  if (stacked >= 0) expected.insert(expected.begin(), stacked);
  check_tensor(op, name, weight, dtype, expected);
}

inline const TypedLoops& loops_of(ScalarType dtype) {
  return dtype == ScalarType::Float ? loops().single : loops().bfloat16;
}

inline int64_t bytes_of(ScalarType dtype) { return dtype == ScalarType::Float ? 4 : 2; }

inline char* data_of(const Tensor& tensor) { return static_cast<char*>(tensor.data_ptr()); }

inline Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  AtenTensorHandle result;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides.data(),
      dtype == ScalarType::Float ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16(),
      aoti_torch_device_type_cpu(), 0, &result));
  return Tensor(result);
}

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

// Contiguous, whatever the strides of `tensor`.
inline Tensor empty_as(const Tensor& tensor) { return empty(tensor.sizes(), tensor.scalar_type()); }

// What an operator returns for a gradient that nobody wants: each its own, since outputs must not share memory.
inline Tensor nothing(ScalarType dtype) { return empty({0}, dtype); }

// Contiguous; the stride of an axis of one element is whatever it was.
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A view of rows x columns elements; transposition is a swap of the strides.
struct Matrix {
  char* data;
  int64_t rows, columns;
  int64_t row_stride, column_stride;
  ScalarType dtype;

  Matrix(char* data, int64_t rows, int64_t columns, int64_t row_stride, ScalarType dtype)
      : data(data), rows(rows), columns(columns), row_stride(row_stride), column_stride(1), dtype(dtype) {}

  Matrix transposed() const {
    Matrix result = *this;
    std::swap(result.rows, result.columns);
    std::swap(result.row_stride, result.column_stride);
    return result;
  }
  Matrix row_range(int64_t first, int64_t count) const {
    Matrix result = *this;
    result.data += first * row_stride * bytes_of(dtype);
    result.rows = count;
    return result;
  }
  Matrix column_range(int64_t first, int64_t count) const {
    Matrix result = *this;
    result.data += first * column_stride * bytes_of(dtype);
    result.columns = count;
    return result;
  }
};

// Any tensor whose last axis is dense and whose leading axes collapse into one row axis.
inline Matrix matrix_of(const Tensor& tensor, int64_t rows, int64_t columns) {
  return Matrix(data_of(tensor), rows, columns, columns, tensor.scalar_type());
}

// Consecutive samples with one adapter; adapter -1 is off.
struct Run {
  int64_t first, count, adapter;
};

// `adapters` has one entry a sample, or is empty: then all samples share adapter 0. `stacked` as for check_weight.
inline std::vector<Run> runs_of(
    const char* op, const std::vector<int64_t>& adapters, int64_t samples, int64_t stacked) {
  const int64_t count = stacked < 0 ? 1 : stacked;
  if (adapters.empty()) return samples ? std::vector<Run>{{0, samples, 0}} : std::vector<Run>();
  check(
      static_cast<int64_t>(adapters.size()) == samples, op, ": adapters has ", adapters.size(), " entries for ", samples,
      " samples");
  std::vector<Run> runs;
  for (int64_t b = 0; b < samples; ++b) {
    check(
        adapters[b] >= -1 && adapters[b] < count, op, ": adapters[", b, "] is ", adapters[b],
        ", accepted are -1 (off) to ", count - 1);
    if (!runs.empty() && runs.back().adapter == adapters[b]) ++runs.back().count;
    else runs.push_back({b, 1, adapters[b]});
  }
  return runs;
}

// Samples of the longest run: what no caller keeps is as large as that, and used again by every run.
inline int64_t longest(const std::vector<Run>& runs) {
  int64_t samples = 0;
  for (const Run& run : runs) samples = std::max(samples, run.count);
  return samples;
}

}  // namespace cegate
