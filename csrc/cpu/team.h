// Samples to threads: in whole rounds of one per thread; what is left over is shared by all threads, each doing its part
// of every sample. No result depends on which of the two happened.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "simd.h"

namespace privimage {
namespace ISA_NAMESPACE {

// The threads that work on one sample, and which of them this is.
struct Team {
  int member = 0, size = 1;
  HOST_DEVICE void barrier() const {
#ifdef _OPENMP
    if (size > 1) {
#pragma omp barrier
    }
#endif
  }
  // This member's part of n items, a contiguous one.
  HOST_DEVICE int64_t first(int64_t n) const { return n * member / size; }
  HOST_DEVICE int64_t last(int64_t n) const { return n * (member + 1) / size; }
};

// Calls sample(b, shared, own, team) for every b < samples: `shared` is memory of the team, `own` of the thread, each
// `bytes` long (a multiple of 64) and the same for a thread that works alone.
template <class Sample>
static void for_each_sample(int64_t samples, int num_threads, size_t bytes, const Sample& sample) {
  const int threads = num_threads > 1 ? num_threads : 1;
  char* memory = static_cast<char*>(scratch(bytes * static_cast<size_t>(threads)));
  const int64_t alone = samples / threads * threads;
  const auto work = [&](Team team) {
    char* own = memory + bytes * static_cast<size_t>(team.member);
    for (int64_t b = team.member; b < alone; b += team.size) sample(b, own, own, Team{});
    team.barrier();
    for (int64_t b = alone; b < samples; ++b) sample(b, memory, own, team);
  };
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    work(Team{omp_get_thread_num(), omp_get_num_threads()});
    return;
  }
#endif
  work(Team{});
}

}  // namespace ISA_NAMESPACE
}  // namespace privimage
