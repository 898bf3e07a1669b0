// Chooses the loops and tiles for the CPU the process runs on.
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "loops.h"
#include "tiles.h"

#ifdef CEGATE_X86
#include <cpuid.h>
#endif

namespace cegate {

extern const Loops loops_portable;
#ifdef CEGATE_X86
extern const Loops loops_avx2, loops_avx512;
extern const Tiles tiles_avx2, tiles_avx512, tiles_avx512_bf16;
#endif

namespace {

struct Chosen {
  const char* name;
  const Loops& loops;
  const Tiles *float32_tiles, *bfloat16_tiles;
};

#ifdef CEGATE_X86
// Whether the processor multiplies tiles of bfloat16, which oneDNN does up to four times as fast as pairs of vectors.
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);
}
#endif

Chosen choose() {
#ifdef CEGATE_X86
  // the best that the processor has, up to the one that is asked for
  const char* wish = std::getenv("CEGATE_CPU");
  auto allows = [&](std::initializer_list<const char*> names) {
    bool named = wish == nullptr;
    for (const char* name : names) named = named || std::strcmp(wish, name) == 0;
    return named;
  };
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  const bool pairs = avx512 && __builtin_cpu_supports("avx512bf16");
  if (avx512 && has_amx() && allows({"amx"})) return {"amx", loops_avx512, &tiles_avx512, nullptr};
  if (pairs && allows({"amx", "avx512_bf16"})) return {"avx512_bf16", loops_avx512, &tiles_avx512, &tiles_avx512_bf16};
  if (avx512 && allows({"amx", "avx512_bf16", "avx512"})) return {"avx512", loops_avx512, &tiles_avx512, nullptr};
  if (avx2 && allows({"amx", "avx512_bf16", "avx512", "avx2"})) return {"avx2", loops_avx2, &tiles_avx2, nullptr};
#endif
  return {"portable", loops_portable, nullptr, nullptr};
}

const Chosen& chosen() {
  static const Chosen chosen = choose();
  return chosen;
}

}  // namespace

const Loops& loops() { return chosen().loops; }

const char* cpu_capability() { return chosen().name; }

const Tiles* float32_tiles() { return chosen().float32_tiles; }

const Tiles* bfloat16_tiles() { return chosen().bfloat16_tiles; }

}  // namespace cegate
