// ChaCha20 normals, kLanes blocks at a time: lane j of every register is block first + j.
#pragma once

#include "../chacha20.h"
#include "../gaussian.h"
#include "simd.h"

namespace privimage {
namespace ISA_NAMESPACE {

constexpr int kNoiseBatch = kLanes * kNormalsPerBlock;  // normals per call of noise_batch

struct VectorMath {
  using D = vd;
  using U64 = vul;
  static HOST_DEVICE U64 bits(D v) { return reinterpret_cast<U64>(v); }
  static HOST_DEVICE D from_bits(U64 u) { return reinterpret_cast<D>(u); }
  static HOST_DEVICE D sqrt(D v) {
    // Element by element: compilers merge it into one vector instruction, with -fno-math-errno.
    D r;
    for (int i = 0; i < kDoubleLanes; ++i) r[i] = __builtin_sqrt(v[i]);
    return r;
  }
};

// The 8 normals of each of the blocks first .. first+kLanes-1, in order, into out[kNoiseBatch].
static inline __attribute__((always_inline)) void noise_batch(const NoiseKey& noise, int64_t first, double* out) {
  const uint32_t nonce[3] = {noise.stream, noise.rank, noise.step};
  vu counter = vu{};
  for (int i = 0; i < kLanes; ++i) counter[i] = static_cast<uint32_t>(first) + static_cast<uint32_t>(i);
  vu words[16];
  chacha20_block<vu>(noise.key, counter, nonce, vu{}, words);

  uint32_t lanes[16][kLanes];
  for (int w = 0; w < 16; ++w) store(lanes[w], words[w]);
  for (int half = 0; half < 2; ++half) {
    vd normals[kNormalsPerBlock];
    for (int i = 0; i < 4; ++i) {
      vul w[4];
      for (int k = 0; k < 4; ++k)
        w[k] = __builtin_convertvector(load<vu_half>(lanes[4 * i + k] + half * kDoubleLanes), vul);
      box_muller<VectorMath>(w[0], w[1], w[2], w[3], normals[2 * i], normals[2 * i + 1]);
    }
    double* block = out + half * kDoubleLanes * kNormalsPerBlock;
    for (int i = 0; i < kNormalsPerBlock; i += kDoubleLanes) {
      transpose_doubles(normals + i);
      for (int j = 0; j < kDoubleLanes; ++j) store(block + j * kNormalsPerBlock + i, normals[i + j]);
    }
  }
}

}  // namespace ISA_NAMESPACE
}  // namespace privimage
