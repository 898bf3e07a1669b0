// Chooses the loops and tiles for the CPU the process runs on.
#include <cstdlib>
#include <cstring>

#include "loops.h"
#include "tiles.h"

namespace cegate {

extern const Loops loops_portable;
#ifdef CEGATE_X86
extern const Loops loops_avx2, loops_avx512;
extern const Tiles tiles_avx2, tiles_avx512;
#endif

namespace {

struct Chosen {
  const Loops& loops;
  const Tiles* tiles;
};

Chosen choose() {
#ifdef CEGATE_X86
  const char* wish = std::getenv("CEGATE_CPU");
  const bool any = wish == nullptr;
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  if (avx512 && (any || std::strcmp(wish, "avx512") == 0)) return {loops_avx512, &tiles_avx512};
  if (avx2 && (any || std::strcmp(wish, "avx2") == 0 || std::strcmp(wish, "avx512") == 0))
    return {loops_avx2, &tiles_avx2};
#endif
  return {loops_portable, nullptr};
}

const Chosen& chosen() {
  static const Chosen chosen = choose();
  return chosen;
}

}  // namespace

const Loops& loops() { return chosen().loops; }

const Tiles* tiles() { return chosen().tiles; }

}  // namespace cegate
