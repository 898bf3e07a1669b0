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

}  // namespace
}  // namespace cegate
