// Vectors of CEGATE_LANES floats for the files that are compiled once per instruction set. Everything here has internal
// linkage, and no standard header with inline code is included: the linker keeps one copy of such code, of any
// instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

// The name of this instruction set's table of a kind: loops_avx2, tiles_avx2.
#define CEGATE_JOIN(a, b) a##_##b
#define CEGATE_NAMED(kind, isa) CEGATE_JOIN(kind, isa)
#define CEGATE_TABLE(kind) CEGATE_NAMED(kind, CEGATE_ISA)

namespace cegate {
namespace {

constexpr int64_t kLanes = CEGATE_LANES;
typedef float Vector __attribute__((vector_size(4 * CEGATE_LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * CEGATE_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * CEGATE_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * CEGATE_LANES)));

// One broadcast; lane by lane, GCC writes a masked move for each. x - 0 is x, of zeros and NaN too.
inline Vector splat(float value) { return value - Vector{}; }

inline Vector load_vector(const float* source) {
  Vector result;
  memcpy(&result, source, sizeof(result));
  return result;
}

inline void store_vector(float* target, Vector value) { memcpy(target, &value, sizeof(value)); }

// Lane i of the result is element mask[i] of the two, counted through.
inline Vector shuffle(Vector first, Vector second, Integers mask) {
#ifdef __clang__
  Vector result;
  for (int64_t i = 0; i < kLanes; ++i) result[i] = mask[i] < kLanes ? first[mask[i]] : second[mask[i] - kLanes];
  return result;
#else
  return __builtin_shuffle(first, second, mask);
#endif
}

inline int64_t lanes_left(int64_t position, int64_t width) {
  return width - position < kLanes ? width - position : kLanes;
}

// The first `count` lanes; the rest is zero. A full vector is the common case and becomes one instruction.
inline Vector load_lanes(const float* source, int64_t count) {
  if (count == kLanes) return load_vector(source);
  Vector result = splat(0.0f);
  for (int64_t i = 0; i < count; ++i) result[i] = source[i];
  return result;
}

inline void store_lanes(float* target, Vector value, int64_t count) {
  if (count == kLanes) return store_vector(target, value);
  for (int64_t i = 0; i < count; ++i) target[i] = value[i];
}

struct Bfloat16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(Bfloat16 value) {
  uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

inline void assign(float& target, float value) { target = value; }

inline void assign(Bfloat16& target, float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  target.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline Halves load_halves(const Bfloat16* source, int64_t count) {
  Halves result = {};
  if (count == kLanes) {
    memcpy(&result, source, sizeof(result));
  } else {
    for (int64_t i = 0; i < count; ++i) result[i] = source[i].bits;
  }
  return result;
}

inline Vector bits_of(Words words) {
  Vector result;
  memcpy(&result, &words, sizeof(result));
  return result;
}

inline Vector load_lanes(const Bfloat16* source, int64_t count) {
  return bits_of(__builtin_convertvector(load_halves(source, count), Words) << 16);
}

inline void store_lanes(Bfloat16* target, Vector value, int64_t count) {
  if (count < kLanes) {
    for (int64_t i = 0; i < count; ++i) assign(target[i], value[i]);
    return;
  }
  Words words;
  memcpy(&words, &value, sizeof(words));
  const Words rounded = (words + 0x7fffu + ((words >> 16) & 1u)) >> 16;
  const Words kept = (words & 0x7fffffffu) > 0x7f800000u ? words - words + 0x7fc0u : rounded;
  const Halves halves = __builtin_convertvector(kept, Halves);
  memcpy(target, &halves, sizeof(halves));
}

}  // namespace
}  // namespace cegate
