// Sums over rows without atomics: every block leaves partial sums, one kernel adds them in the order of the blocks.
#pragma once

#include "../params.h"

namespace dab_fast {

// out[i] = sum over r of partial[r, column + i], i < count; partial: [rows, columns]
void sum_partials(const void* partial, int64_t rows, int64_t columns, int64_t column, int64_t count, const Operand& out,
                  const char* name, int device, void* stream);

}  // namespace dab_fast
