// The CUDA backend: launches on a stream that the caller owns, on the primary context of `device`, which is torch's too.
// A failure throws std::runtime_error with the kernel's name and CUDA's text.
#pragma once

#include <string>
#include <utility>

#include "../params.h"

namespace dab_fast {

int cuda_runtime_version();

// How many devices the driver offers, and why not if it cannot be asked.
std::pair<int, std::string> cuda_devices();

// Rows of the partial sums of a backward over `rows` rows; depends on nothing else, so results do not either.
int64_t cuda_partial_rows(int64_t rows);

void cuda_box_position_embed(const PositionEmbed&, double temperature, int device, void* stream);
void cuda_box_position_embed_backward(const PositionEmbed&, double temperature, int device, void* stream);
void cuda_box_tail(const BoxTail&, int device, void* stream);
void cuda_box_tail_backward(const BoxTail&, int device, void* stream);

}  // namespace dab_fast
