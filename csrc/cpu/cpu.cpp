#include "cpu.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#include "loops.h"
#include "scalar.h"

namespace dab_fast {
namespace {

const Loops& choose_loops() {
#if defined(DAB_X86_ISAS)
  __builtin_cpu_init();
  const char* wanted = std::getenv("DAB_FAST_CPU_ISA");
  const auto allows = [wanted](const char* isa) { return !wanted || !std::strcmp(wanted, isa); };
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && allows("avx512")) return loops_avx512();
  if (avx2 && allows("avx2")) return loops_avx2();
#endif
  return loops_portable();
}

const Loops& loops() {
  static const Loops& chosen = choose_loops();
  return chosen;
}

// Starting and joining a thread costs about this many elements' work.
constexpr int64_t kElementsPerThread = 1 << 17;

// Threads live for one call. There is no pool, no lock and no other state that a fork() could leave half-copied in a
// DataLoader worker, and no OpenMP runtime beside torch's; the price, some 20 us a thread, is paid only by calls that
// are several times longer.
template <typename Work>
void for_each_chunk(int64_t chunks, int64_t elements, int threads, const Work& work) {
  const int64_t useful = std::min<int64_t>(elements / kElementsPerThread, chunks);
  const int64_t count = std::max<int64_t>(1, std::min<int64_t>(threads, useful));
  const auto share = [&](int64_t t) {
    for (int64_t chunk = chunks * t / count; chunk < chunks * (t + 1) / count; ++chunk) work(chunk);
  };
  std::vector<std::thread> helpers;
  helpers.reserve(count - 1);
  int64_t started = 1;
  for (; started < count; ++started) {
    try {
      helpers.emplace_back(share, started);
    } catch (const std::system_error&) {  // the limit on threads is reached: do the rest here
      break;
    }
  }
  share(0);
  for (int64_t t = started; t < count; ++t) share(t);
  for (std::thread& helper : helpers) helper.join();
}

int64_t chunk_count(const Rows& rows) { return (rows.count() + kChunkRows - 1) / kChunkRows; }

template <typename Loop>
void for_each_row_range(const Rows& rows, int64_t elements, int threads, const Loop& loop) {
  for_each_chunk(chunk_count(rows), elements, threads, [&](int64_t chunk) {
    loop(chunk * kChunkRows, std::min((chunk + 1) * kChunkRows, rows.count()));
  });
}

// Adds the chunks' partial sums in their order and stores `count` of them from `column` on.
template <typename Real>
void store_sum(const void* partial, int64_t chunks, int64_t columns, int64_t column, int64_t count, const Operand& out,
               int64_t out_offset) {
  std::vector<Real> sum(count, Real(0));
  const Real* rows = static_cast<const Real*>(partial) + column;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t i = 0; i < count; ++i) sum[i] += rows[chunk * columns + i];
  }
  store(out, out_offset, count, sum.data());
}

}  // namespace

const char* cpu_isa() { return loops().isa; }

void inverse_wavelengths(int num_feats, double temperature, double* out) {
  for (int k = 0; k < num_feats / 2; ++k) out[k] = std::pow(temperature, -2.0 * k / num_feats);
}

void cpu_box_position_embed(const PositionEmbed& p, double temperature, int threads) {
  double wavelengths[kMaxFeats / 2];
  inverse_wavelengths(p.num_feats, temperature, wavelengths);
  const int64_t elements = p.rows.count() * p.coordinates * p.num_feats;
  for_each_row_range(p.rows, elements, threads, [&](int64_t begin, int64_t end) {
    loops().position_embed(p, wavelengths, begin, end);
  });
}

void cpu_box_position_embed_backward(PositionEmbed p, double temperature, int threads) {
  double wavelengths[kMaxFeats / 2];
  inverse_wavelengths(p.num_feats, temperature, wavelengths);
  const int64_t chunks = chunk_count(p.rows), columns = 2 * p.num_feats;
  const bool is_double = p.boxes.dtype == DType::float64;
  const bool summed = p.d_scale.data && p.scale_kind == Scale::shared;
  std::vector<double> partial(summed ? (is_double ? chunks * columns : (chunks * columns + 1) / 2) : 0);
  p.partial = partial.data();
  const int64_t elements = p.rows.count() * p.coordinates * p.num_feats;
  for_each_chunk(chunks, elements, threads, [&](int64_t chunk) { loops().position_embed_backward(p, wavelengths, chunk); });
  if (summed) {
    const auto store_it = is_double ? store_sum<double> : store_sum<float>;
    store_it(p.partial, chunks, columns, 0, columns, p.d_scale, 0);
  }
}

void cpu_box_tail(const BoxTail& p, int threads) {
  const int64_t elements = p.rows.count() * p.width;
  for_each_row_range(p.rows, elements, threads, [&](int64_t begin, int64_t end) { loops().box_tail(p, begin, end); });
}

void cpu_box_tail_backward(BoxTail p, int threads) {
  const int64_t chunks = chunk_count(p.rows), columns = kBoxOutputs * (int64_t(p.width) + 1);
  const bool is_double = p.refined.dtype == DType::float64;
  const bool summed = p.d_weight.data || p.d_bias.data;
  std::vector<double> partial(summed ? (is_double ? chunks * columns : (chunks * columns + 1) / 2) : 0);
  p.partial = partial.data();
  const int64_t elements = p.rows.count() * p.width;
  for_each_chunk(chunks, elements, threads, [&](int64_t chunk) { loops().box_tail_backward(p, chunk); });
  const auto store_it = is_double ? store_sum<double> : store_sum<float>;
  if (p.d_weight.data) store_it(p.partial, chunks, columns, 0, kBoxOutputs * int64_t(p.width), p.d_weight, 0);
  if (p.d_bias.data) store_it(p.partial, chunks, columns, kBoxOutputs * int64_t(p.width), kBoxOutputs, p.d_bias, 0);
}

}  // namespace dab_fast
