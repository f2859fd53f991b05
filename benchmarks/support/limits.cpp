// SPDX-License-Identifier: Apache-2.0
#include "support/limits.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <set>
#include <vector>

#include "moe/backend/cpu/level.hpp"
#include "support/measure.hpp"
#include "support/options.hpp"
#include "support/units.hpp"

#if defined(MOE_X86)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bench {
namespace {

struct freed {
  void operator()(std::byte* p) const { std::free(p); }
};
using big_block = std::unique_ptr<std::byte, freed>;

// More than any cache holds, in huge pages where the system has them.
constexpr std::size_t block_bytes = std::size_t{1} << 30;

big_block make_block() {
  big_block block(static_cast<std::byte*>(std::aligned_alloc(std::size_t{2} << 20, block_bytes)));
#if defined(__linux__)
  if (block) madvise(block.get(), block_bytes, MADV_HUGEPAGE);
#endif
  if (block) std::fill_n(block.get(), block_bytes, std::byte{1});
  return block;
}

// Reads `bytes` as `Streams` streams side by side, asking for what comes 1 KiB later in each: the fastest found on the
// machines this was tried on.
template <int Streams>
void read_plain(const std::byte* p, std::size_t bytes) {
  constexpr std::size_t ahead = 1024, words = 64 / sizeof(std::uint64_t);
  const std::size_t part = bytes / Streams;
  std::uint64_t sum[words] = {};
  for (std::size_t i = 0; i < part; i += 64)
    for (int s = 0; s < Streams; ++s) {
      const std::byte* line = p + static_cast<std::size_t>(s) * part + i;
#if defined(__GNUC__)
      __builtin_prefetch(line + ahead);
#endif
      const auto* v = reinterpret_cast<const std::uint64_t*>(line);
      for (std::size_t j = 0; j < words; ++j) sum[j] += v[j];
    }
  keep(sum);
}

#if defined(MOE_X86)
template <int Streams>
MOE_TARGET("avx512f") void read_avx512(const std::byte* p, std::size_t bytes) {
  constexpr std::size_t ahead = 1024;
  const std::size_t part = bytes / Streams;
  __m512i sum[Streams];
  for (int s = 0; s < Streams; ++s) sum[s] = _mm512_setzero_si512();
  for (std::size_t i = 0; i < part; i += 64)
    for (int s = 0; s < Streams; ++s) {
      const std::byte* line = p + static_cast<std::size_t>(s) * part + i;
      _mm_prefetch(reinterpret_cast<const char*>(line + ahead), _MM_HINT_T0);
      sum[s] = _mm512_add_epi64(sum[s], _mm512_load_si512(line));
    }
  keep(sum);
}
#endif

// A way to come near a limit: `work(thread)` returns the amount that one of the threads did, in a few milliseconds.
struct way {
  double machine_limits::* limit;
  std::function<double(int)> work;
  struct result {
    double rate;
    int tenth;  // of the time
    bool undisturbed;
  };
  std::vector<result> tries{};
};

using read_function = void (*)(const std::byte*, std::size_t);

// Every thread has a share of the block, of which each try, whatever the function, reads the part after that of the try
// before: when one comes again, no cache has it.
class shares {
 public:
  shares(int threads, const std::byte* block) : bytes_(block_bytes / static_cast<std::size_t>(threads)) {
    for (int i = 0; i < threads; ++i) threads_.push_back({block + static_cast<std::size_t>(i) * bytes_});
  }
  double read(int thread, read_function f) {
    share& own = threads_[static_cast<std::size_t>(thread)];
    const std::size_t part = std::min(most, bytes_ / 4096 * 4096);
    if (own.next + part > bytes_) own.next = 0;
    f(own.first + own.next, part);
    own.next += part;
    return static_cast<double>(part);
  }

 private:
  struct alignas(64) share {
    const std::byte* first;
    std::size_t next = 0;
  };
  static constexpr std::size_t most = std::size_t{32} << 20;
  std::size_t bytes_;
  std::vector<share> threads_;
};

std::vector<way> ways_of(int threads, const std::byte* block) {
  std::vector<way> ways;
  const auto read = [&, from = std::make_shared<shares>(threads, block)](auto... functions) {
    if (block)
      (ways.push_back({&machine_limits::dram_read, [=](int thread) { return from->read(thread, functions); }}), ...);
  };
#if defined(MOE_X86)
  if (moe::includes(moe::cpu_level_in_use(), moe::cpu_level::avx512)) read(read_avx512<1>, read_avx512<2>, read_avx512<4>);
  else
#endif
    read(read_plain<1>, read_plain<2>, read_plain<4>);
  const auto multiply = [&](double machine_limits::* limit, unit_loop loop) {
    if (loop) ways.push_back({limit, [loop](int) { return loop(1 << 20); }});
  };
  const unit_loops loops = loops_in_use();
  multiply(&machine_limits::fma_f32, loops.fma_f32);
  multiply(&machine_limits::vnni_int8, loops.vnni_int8);
  multiply(&machine_limits::avx512_bf16, loops.avx512_bf16);
  multiply(&machine_limits::amx_bf16, loops.amx_bf16);
  multiply(&machine_limits::amx_int8, loops.amx_int8);
  return ways;
}

// Whether tries that came near the limit are spread over the time: then it is no accident.
bool repeated(const std::vector<way>& ways, double machine_limits::* limit, double best) {
  std::set<int> tenths;
  for (const way& w : ways)
    for (const way::result& t : w.tries)
      if (w.limit == limit && t.rate >= 0.95 * best) tenths.insert(t.tenth);
  return tenths.size() >= 3;
}

// Of tries that began undisturbed, where there are any: what memory gives changes with what others of the host ask of it, and
// rows are medians, too.
double median_rate(const way& w) {
  std::vector<double> rates, all;
  for (const way::result& t : w.tries) {
    all.push_back(t.rate);
    if (t.undisturbed) rates.push_back(t.rate);
  }
  return median(rates.empty() ? all : rates);
}

}  // namespace

// All ways in turn, over and over, since others may have half of the processor for seconds. The best try of a unit counts.
machine_limits measure_limits(int threads, int rounds) {
  machine_limits found{.threads = threads};
  const big_block block = make_block();
  std::vector<way> ways = ways_of(threads, block.get());
  const double start = seconds(), span = 0.06 * std::min(rounds, usual_rounds) * static_cast<double>(ways.size());
  for (double passed = 0; passed < span; passed = seconds() - start) {
    const bool alone = undisturbed(threads);  // which learns how fast that is
    for (way& w : ways) {
      std::vector<double> amounts(static_cast<std::size_t>(threads));
      const double time = together(threads, [&](int thread) { amounts[static_cast<std::size_t>(thread)] = w.work(thread); });
      const double rate = std::accumulate(amounts.begin(), amounts.end(), 0.) / time;
      w.tries.push_back({rate, static_cast<int>(10 * passed / span), alone});
      if (w.limit != &machine_limits::dram_read) found.*w.limit = std::max(found.*w.limit, rate);
    }
  }
  for (const way& w : ways)
    if (w.limit == &machine_limits::dram_read) found.dram_read = std::max(found.dram_read, median_rate(w));
  for (const way& w : ways) found.quiet = found.quiet && repeated(ways, w.limit, found.*w.limit);
  return found;
}

}  // namespace bench
