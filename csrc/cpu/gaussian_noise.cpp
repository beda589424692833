// Standard normals into memory, for the query's histogram and for tests; training draws them inside private_step.
#include "kernel_list.h"
#include "noise.h"

namespace privimage {
namespace ISA_NAMESPACE {

void gaussian_noise(const GaussianNoiseParams& p) {
  const int64_t begin = p.noise.offset, end = begin + p.size;
  const int64_t first = begin / kNoiseBatch, last = div_up(end, kNoiseBatch);
#pragma omp parallel for schedule(static) num_threads(p.num_threads) if (last - first > 4)
  for (int64_t batch = first; batch < last; ++batch) {
    alignas(64) double normals[kNoiseBatch];
    noise_batch(p.noise, batch * kNoiseBlocks, normals);
    const int64_t at = batch * kNoiseBatch;
    const int64_t lo = max64(begin, at), hi = min64(end, at + kNoiseBatch);
    std::memcpy(p.out + (lo - begin), normals + (lo - at), static_cast<size_t>(hi - lo) * sizeof(double));
  }
}

}  // namespace ISA_NAMESPACE
}  // namespace privimage
