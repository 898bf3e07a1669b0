// Chooses the loops and tiles for the CPU the process runs on.
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "loops.h"
#include "tiles.h"

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
  if (pairs && allows({"avx512_bf16"})) return {"avx512_bf16", loops_avx512, &tiles_avx512, &tiles_avx512_bf16};
  if (avx512 && allows({"avx512_bf16", "avx512"})) return {"avx512", loops_avx512, &tiles_avx512, nullptr};
  if (avx2 && allows({"avx512_bf16", "avx512", "avx2"})) return {"avx2", loops_avx2, &tiles_avx2, nullptr};
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
