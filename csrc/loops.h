// The loops between the matrix products, over rows of memory. No torch here: loops.cpp is compiled once per instruction
// set, and anything it shared with the other files could be linked from the wrong copy.
#pragma once

#include <cstdint>

namespace cegate {

enum class Activation : int64_t { none = 0, relu = 1, gelu = 2 };

// Widths that one grid row of the frequency module needs: columns W, kept column frequencies L, expert width d, d padded
// to whole vectors.
struct RowShape {
  int64_t columns;
  int64_t frequencies;
  int64_t width;
  int64_t padded;
};

// Loops on elements of one dtype (float32 or bfloat16); sums and scratch memory are float32.
struct TypedLoops {
  // line[w, 0:count] = source[w * stride + 0:count] for w < columns; line rows are `line_stride` apart.
  void (*load)(const void* source, int64_t stride, int64_t columns, int64_t count, float* line, int64_t line_stride);
  void (*store)(void* target, int64_t stride, int64_t columns, int64_t count, const float* line, int64_t line_stride);

  // target[r * target_stride + j] = <source[r], weights[j]> for j < 3: a product too narrow for a BLAS.
  void (*dot3)(
      const void* source, const void* weights, int64_t rows, int64_t width, void* target, int64_t target_stride);

  // hidden [W, 3d+3] and its low-pass line [W, 2 padded] -> active [W, 3d+3] = (relu | gates) in place of hidden, and
  // mixed [W, 3d+3] = (gates * relu | gates). `bias` is [3d+3].
  void (*mix)(const RowShape& shape, void* hidden, void* mixed, const float* line, const void* bias);

  // dmixed [W, 3d+3] (without scale) -> gradient of the activations' input in its place, its two filtered experts in
  // line [W, 2 padded]. With `mixed`, also mixed [W, 3d+3] as in `mix` and sums [3d+4]: bias gradient, scale gradient.
  void (*unmix)(
      const RowShape& shape, void* dmixed, const void* active, float scale, float* line, void* mixed, float* sums);

  // Writes the filtered experts back: dhidden[d:2d] = line[0], dhidden[2d:3d] -= line[1].
  void (*split)(const RowShape& shape, void* dhidden, const float* line);

  // hidden = activation(pre) over [rows, width]; hidden may be pre.
  void (*activate)(const void* pre, void* hidden, Activation activation, int64_t rows, int64_t width);

  // dhidden [rows, width] *= activation'(pre); hidden (or null) = activation(pre).
  void (*deactivate)(void* dhidden, const void* pre, void* hidden, Activation activation, int64_t rows, int64_t width);

  // values[0:count] *= factor.
  void (*scale)(void* values, float factor, int64_t count);

  // target[r] = base[r] + scale * bias over rows; base or bias may be null (zero). target may be base.
  void (*add_bias)(
      void* target, int64_t target_stride, const void* base, int64_t base_stride, const void* bias, float scale,
      int64_t rows, int64_t width);

  // sums[0:width] += sum over rows of source.
  void (*sum_rows)(const void* source, int64_t stride, int64_t rows, int64_t width, float* sums);
};

struct Loops {
  int64_t lanes;  // floats per vector
  TypedLoops single;
  TypedLoops bfloat16;

  // out[m, 0:width] = sum_k a[m * a_out + k * a_in] * in[k, 0:width]; width is a multiple of `lanes`.
  void (*combine)(
      float* out, int64_t out_stride, const float* in, int64_t in_stride, const float* a, int64_t a_out, int64_t a_in,
      int64_t outs, int64_t ins, int64_t width);
};

// The fastest set this CPU can run; CEGATE_CPU=portable|avx2|avx512|avx512_bf16|amx asks for a lesser one.
const Loops& loops();

// Which of these it is.
const char* cpu_capability();

}  // namespace cegate
