// Compiled once per instruction set (CEGATE_ISA, CEGATE_LANES). Everything but the table at the end has internal linkage.
#include "loops.h"

#include "vectors.h"

namespace cegate {
namespace {

inline float sum(Vector value) {
  float total = 0;
  for (int64_t i = 0; i < kLanes; ++i) total += value[i];
  return total;
}

// e^x to about 1 ulp; below -87 as at -87, NaN stays NaN.
inline Vector exponential(Vector x) {
  const Vector low = splat(-87.0f);
  x = x < low ? low : x;
  const Vector magic = splat(12582912.0f);  // adding it rounds to an integer in the low bits
  const Vector shifted = x * splat(1.44269504f) + magic;
  const Vector n = shifted - magic;
  Vector r = x - n * splat(0.693145752f);
  r = r - n * splat(1.42860677e-6f);
  Vector p = splat(1.0f / 5040);
  p = p * r + splat(1.0f / 720);
  p = p * r + splat(1.0f / 120);
  p = p * r + splat(1.0f / 24);
  p = p * r + splat(1.0f / 6);
  p = p * r + splat(0.5f);
  p = p * r + splat(1.0f);
  p = p * r + splat(1.0f);
  Integers exponent, bits;
  memcpy(&exponent, &shifted, sizeof(exponent));
  memcpy(&bits, &p, sizeof(bits));
  bits += exponent << 23;
  memcpy(&p, &bits, sizeof(p));
  return p;
}

// Normal distribution function and density at x. erfc(y) = exp(-y^2) t q(t), t = 1 / (1 + y / 2): q is our own Chebyshev
// fit, relative error 5e-8 for y in 0..12.
inline void normal(Vector x, Vector& distribution, Vector& density) {
  const Vector zero = splat(0.0f), one = splat(1.0f);
  const Vector y = (x < zero ? -x : x) * splat(0.707106781f);
  const Vector decay = exponential(splat(-0.5f) * x * x);
  const Vector t = one / (one + splat(0.5f) * y);
  const Vector s = t + t - one;
  Vector q = splat(-0.00023514550412073731f);
  q = q * s + splat(0.0003834378148894757f);
  q = q * s + splat(0.0014918131055310369f);
  q = q * s + splat(-0.0032235844992101192f);
  q = q * s + splat(-0.010741893202066422f);
  q = q * s + splat(0.0182187557220459f);
  q = q * s + splat(0.13973477482795715f);
  q = q * s + splat(0.343580424785614f);
  q = q * s + splat(0.5107913613319397f);
  const Vector tail = splat(0.5f) * decay * t * q;
  distribution = x < zero ? tail : one - tail;
  density = splat(0.398942280f) * decay;
}

template <typename T>
void load(const void* source, int64_t stride, int64_t columns, int64_t count, float* line, int64_t line_stride) {
  for (int64_t w = 0; w < columns; ++w) {
    const T* from = static_cast<const T*>(source) + w * stride;
    for (int64_t c = 0; c < count; ++c) line[w * line_stride + c] = to_float(from[c]);
  }
}

template <typename T>
void store(void* target, int64_t stride, int64_t columns, int64_t count, const float* line, int64_t line_stride) {
  for (int64_t w = 0; w < columns; ++w) {
    T* to = static_cast<T*>(target) + w * stride;
    for (int64_t c = 0; c < count; ++c) assign(to[c], line[w * line_stride + c]);
  }
}

template <typename T>
void dot3(
    const void* source_memory, const void* weight_memory, int64_t rows, int64_t width, void* target_memory,
    int64_t target_stride) {
  const T* weights = static_cast<const T*>(weight_memory);
  constexpr int64_t kBlock = 4;  // rows that share a load of the weights
  for (int64_t row = 0; row < rows; row += kBlock) {
    const int64_t taken = rows - row < kBlock ? rows - row : kBlock;
    const T* source = static_cast<const T*>(source_memory) + row * width;
    Vector totals[kBlock][3];
    for (int64_t r = 0; r < kBlock; ++r)
      for (int64_t j = 0; j < 3; ++j) totals[r][j] = splat(0.0f);
    for (int64_t c = 0; c < width; c += kLanes) {
      const int64_t count = lanes_left(c, width);
      Vector weight[3];
      for (int64_t j = 0; j < 3; ++j) weight[j] = load_lanes(weights + j * width + c, count);
      for (int64_t r = 0; r < kBlock; ++r) {
        const Vector value = load_lanes(source + (r < taken ? r : 0) * width + c, count);
        for (int64_t j = 0; j < 3; ++j) totals[r][j] += value * weight[j];
      }
    }
    for (int64_t r = 0; r < taken; ++r)
      for (int64_t j = 0; j < 3; ++j)
        assign(static_cast<T*>(target_memory)[(row + r) * target_stride + j], sum(totals[r][j]));
  }
}

// Softmax of three logits for up to kLanes tokens at once; token i lies at logits[i * stride].
template <typename T>
inline void softmax(const T* logits, int64_t stride, int64_t tokens, const T* bias, Vector gates[3]) {
  for (int64_t j = 0; j < 3; ++j) {
    gates[j] = splat(0.0f);
    for (int64_t i = 0; i < tokens; ++i) gates[j][i] = to_float(logits[i * stride + j]) + to_float(bias[j]);
  }
  Vector top = gates[0] < gates[1] ? gates[1] : gates[0];
  top = top < gates[2] ? gates[2] : top;
  for (int64_t j = 0; j < 3; ++j) gates[j] = exponential(gates[j] - top);
  const Vector inverse = splat(1.0f) / (gates[0] + gates[1] + gates[2]);
  for (int64_t j = 0; j < 3; ++j) gates[j] = gates[j] * inverse;
}

template <typename T>
void mix(const RowShape& shape, void* hidden_memory, void* mixed_memory, const float* line, const void* bias_memory) {
  const int64_t d = shape.width, stride = 3 * d + 3;
  T* hidden = static_cast<T*>(hidden_memory);
  T* mixed = static_cast<T*>(mixed_memory);
  const T* bias = static_cast<const T*>(bias_memory);
  const Vector zero = splat(0.0f);
  for (int64_t first = 0; first < shape.columns; first += kLanes) {
    const int64_t tokens = lanes_left(first, shape.columns);
    Vector gates[3];
    softmax(hidden + first * stride + 3 * d, stride, tokens, bias + 3 * d, gates);
    for (int64_t i = 0; i < tokens; ++i) {
      T* token = hidden + (first + i) * stride;
      T* code = mixed + (first + i) * stride;
      const float* low = line + (first + i) * 2 * shape.padded;
      for (int64_t c = 0; c < d; c += kLanes) {
        const int64_t count = lanes_left(c, d);
        Vector pre[3];
        pre[0] = load_lanes(token + c, count);
        pre[1] = load_vector(low + c);
        pre[2] = load_lanes(token + 2 * d + c, count) - load_vector(low + shape.padded + c);
        for (int64_t j = 0; j < 3; ++j) {
          Vector active = pre[j] + load_lanes(bias + j * d + c, count);
          active = active < zero ? zero : active;
          store_lanes(token + j * d + c, active, count);
          store_lanes(code + j * d + c, active * splat(gates[j][i]), count);
        }
      }
      for (int64_t j = 0; j < 3; ++j) {
        assign(token[3 * d + j], gates[j][i]);
        assign(code[3 * d + j], gates[j][i]);
      }
    }
  }
}

template <typename T>
void unmix(
    const RowShape& shape, void* dmixed_memory, const void* active_memory, float scale, float* line,
    void* mixed_memory, float* sums) {
  const int64_t d = shape.width, stride = 3 * d + 3;
  const Vector zero = splat(0.0f);
  for (int64_t w = 0; w < shape.columns; ++w) {
    T* gradient = static_cast<T*>(dmixed_memory) + w * stride;
    const T* active = static_cast<const T*>(active_memory) + w * stride;
    T* code = mixed_memory ? static_cast<T*>(mixed_memory) + w * stride : nullptr;
    float gates[3], dgates[3], dlogits[3];
    for (int64_t j = 0; j < 3; ++j) {
      gates[j] = to_float(active[3 * d + j]);
      Vector products = zero;
      for (int64_t c = 0; c < d; c += kLanes) {
        const int64_t count = lanes_left(c, d);
        products += load_lanes(gradient + j * d + c, count) * load_lanes(active + j * d + c, count);
      }
      dgates[j] = sum(products) + to_float(gradient[3 * d + j]);
    }
    // the mixture is linear in the gates, so this is also <dmixed, mixed>: the token's gradient of the scale
    const float mean = gates[0] * dgates[0] + gates[1] * dgates[1] + gates[2] * dgates[2];
    for (int64_t j = 0; j < 3; ++j) {
      dlogits[j] = scale * gates[j] * (dgates[j] - mean);
      const Vector gate = splat(gates[j]);
      for (int64_t c = 0; c < d; c += kLanes) {
        const int64_t count = lanes_left(c, d);
        const Vector value = load_lanes(active + j * d + c, count);
        Vector dpre = load_lanes(gradient + j * d + c, count) * gate * splat(scale);
        dpre = value > zero ? dpre : zero;
        store_lanes(gradient + j * d + c, dpre, count);
        if (j > 0) store_vector(line + (2 * w + j - 1) * shape.padded + c, dpre);
        if (code) {
          store_lanes(code + j * d + c, value * gate, count);
          store_lanes(sums + j * d + c, load_lanes(sums + j * d + c, count) + dpre, count);
        }
      }
      assign(gradient[3 * d + j], dlogits[j]);
      if (code) {
        assign(code[3 * d + j], gates[j]);
        sums[3 * d + j] += dlogits[j];
      }
    }
    if (code) sums[stride] += mean;
  }
}

template <typename T>
void split(const RowShape& shape, void* dhidden_memory, const float* line) {
  const int64_t d = shape.width, stride = 3 * d + 3;
  for (int64_t w = 0; w < shape.columns; ++w) {
    T* token = static_cast<T*>(dhidden_memory) + w * stride;
    const float* low = line + w * 2 * shape.padded;
    for (int64_t c = 0; c < d; ++c) {
      assign(token[d + c], low[c]);
      assign(token[2 * d + c], to_float(token[2 * d + c]) - low[shape.padded + c]);
    }
  }
}

template <typename T>
void activate(const void* pre_memory, void* hidden_memory, Activation activation, int64_t rows, int64_t width) {
  const T* pre = static_cast<const T*>(pre_memory);
  T* hidden = static_cast<T*>(hidden_memory);
  const Vector zero = splat(0.0f);
  for (int64_t i = 0, size = rows * width; i < size; i += kLanes) {
    const int64_t count = lanes_left(i, size);
    Vector value = load_lanes(pre + i, count);
    if (activation == Activation::relu) value = value < zero ? zero : value;
    if (activation == Activation::gelu) {
      Vector distribution, density;
      normal(value, distribution, density);
      value *= distribution;
    }
    store_lanes(hidden + i, value, count);
  }
}

template <typename T>
void deactivate(
    void* dhidden_memory, const void* pre_memory, void* hidden_memory, Activation activation, int64_t rows,
    int64_t width) {
  T* dhidden = static_cast<T*>(dhidden_memory);
  const T* pre = static_cast<const T*>(pre_memory);
  T* hidden = static_cast<T*>(hidden_memory);
  const Vector zero = splat(0.0f);
  for (int64_t i = 0, size = rows * width; i < size; i += kLanes) {
    const int64_t count = lanes_left(i, size);
    Vector gradient = load_lanes(dhidden + i, count), value = load_lanes(pre + i, count);
    if (activation == Activation::relu) {
      gradient = value > zero ? gradient : zero;
      value = value < zero ? zero : value;
    }
    if (activation == Activation::gelu) {
      Vector distribution, density;
      normal(value, distribution, density);
      gradient *= distribution + value * density;
      value *= distribution;
    }
    store_lanes(dhidden + i, gradient, count);
    if (hidden) store_lanes(hidden + i, value, count);
  }
}

template <typename T>
void scale(void* memory, float factor, int64_t count) {
  T* values = static_cast<T*>(memory);
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t left = lanes_left(i, count);
    store_lanes(values + i, splat(factor) * load_lanes(values + i, left), left);
  }
}

template <typename T>
void add_bias(
    void* target_memory, int64_t target_stride, const void* base_memory, int64_t base_stride, const void* bias_memory,
    float scale, int64_t rows, int64_t width) {
  const T* bias = static_cast<const T*>(bias_memory);
  for (int64_t row = 0; row < rows; ++row) {
    T* target = static_cast<T*>(target_memory) + row * target_stride;
    const T* base = base_memory ? static_cast<const T*>(base_memory) + row * base_stride : nullptr;
    for (int64_t c = 0; c < width; c += kLanes) {
      const int64_t count = lanes_left(c, width);
      Vector value = base ? load_lanes(base + c, count) : splat(0.0f);
      if (bias) value += splat(scale) * load_lanes(bias + c, count);
      store_lanes(target + c, value, count);
    }
  }
}

template <typename T>
void sum_rows(const void* source_memory, int64_t stride, int64_t rows, int64_t width, float* sums) {
  for (int64_t row = 0; row < rows; ++row) {
    const T* source = static_cast<const T*>(source_memory) + row * stride;
    for (int64_t c = 0; c < width; ++c) sums[c] += to_float(source[c]);
  }
}

template <int kOuts, int kVectors>
inline void combine_block(
    float* out, int64_t out_stride, const float* in, int64_t in_stride, const float* a, int64_t a_out, int64_t a_in,
    int64_t ins) {
  Vector total[kOuts][kVectors];
  for (int m = 0; m < kOuts; ++m)
    for (int v = 0; v < kVectors; ++v) total[m][v] = splat(0.0f);
  for (int64_t k = 0; k < ins; ++k) {
    Vector value[kVectors];
    for (int v = 0; v < kVectors; ++v) value[v] = load_vector(in + k * in_stride + v * kLanes);
    for (int m = 0; m < kOuts; ++m) {
      const Vector weight = splat(a[m * a_out + k * a_in]);
      for (int v = 0; v < kVectors; ++v) total[m][v] += weight * value[v];
    }
  }
  for (int m = 0; m < kOuts; ++m)
    for (int v = 0; v < kVectors; ++v) store_vector(out + m * out_stride + v * kLanes, total[m][v]);
}

void combine(
    float* out, int64_t out_stride, const float* in, int64_t in_stride, const float* a, int64_t a_out, int64_t a_in,
    int64_t outs, int64_t ins, int64_t width) {
  constexpr int kVectors = 2;
  int64_t c = 0;
  for (; c + kVectors * kLanes <= width; c += kVectors * kLanes) {
    int64_t m = 0;
    for (; m + 4 <= outs; m += 4)
      combine_block<4, kVectors>(out + m * out_stride + c, out_stride, in + c, in_stride, a + m * a_out, a_out, a_in, ins);
    for (; m < outs; ++m)
      combine_block<1, kVectors>(out + m * out_stride + c, out_stride, in + c, in_stride, a + m * a_out, a_out, a_in, ins);
  }
  for (; c < width; c += kLanes) {
    int64_t m = 0;
    for (; m + 4 <= outs; m += 4)
      combine_block<4, 1>(out + m * out_stride + c, out_stride, in + c, in_stride, a + m * a_out, a_out, a_in, ins);
    for (; m < outs; ++m)
      combine_block<1, 1>(out + m * out_stride + c, out_stride, in + c, in_stride, a + m * a_out, a_out, a_in, ins);
  }
}

template <typename T>
constexpr TypedLoops typed_loops() {
  return {load<T>,       store<T>,      dot3<T>, mix<T>,      unmix<T>,   split<T>,
          activate<T>, deactivate<T>, scale<T>, add_bias<T>, sum_rows<T>};
}

}  // namespace

extern const Loops CEGATE_TABLE(loops);
const Loops CEGATE_TABLE(loops) = {kLanes, typed_loops<float>(), typed_loops<Bfloat16>(), combine};

}  // namespace cegate
