// The CPU loops over a range of rows; compiled once per instruction set, chosen at load time (cpu.cpp).
#pragma once

#include "../params.h"

namespace dab_fast {

// Sums over rows (d_scale of one row, d_weight, d_bias) are kept per chunk of rows and added in the order of the chunks,
// so they do not depend on the number of threads.
constexpr int64_t kChunkRows = 32;

struct Loops {
  const char* isa;
  // inverse_wavelength: [F/2]
  void (*position_embed)(const PositionEmbed&, const double* inverse_wavelength, int64_t begin, int64_t end);
  void (*position_embed_backward)(const PositionEmbed&, const double* inverse_wavelength, int64_t chunk);
  void (*box_tail)(const BoxTail&, int64_t begin, int64_t end);
  void (*box_tail_backward)(const BoxTail&, int64_t chunk);
};

const Loops& loops_portable();
#if defined(DAB_X86_ISAS)
const Loops& loops_avx2();
const Loops& loops_avx512();
#endif

}  // namespace dab_fast
