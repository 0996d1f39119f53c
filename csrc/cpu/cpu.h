// The CPU backend: splits rows over threads and calls the loops of the best instruction set.
#pragma once

#include "../params.h"

namespace dab_fast {

// "avx512", "avx2" or "portable": what the loops were chosen for on this machine.
const char* cpu_isa();

void cpu_box_position_embed(const PositionEmbed&, double temperature, int threads);
void cpu_box_position_embed_backward(PositionEmbed, double temperature, int threads);
void cpu_box_tail(const BoxTail&, int threads);
void cpu_box_tail_backward(BoxTail, int threads);

// temperature^(-2k / num_feats) for k < num_feats / 2
void inverse_wavelengths(int num_feats, double temperature, double* out);

}  // namespace dab_fast
