// Outer products summed in registers: one operand is read a vector at a time, the other one scalar at a time, broadcast.
// kVectors x kBroadcasts accumulators stay in registers, so each loaded vector feeds kBroadcasts multiply-adds.
#pragma once

#include "simd.h"

namespace privimage {
namespace ISA_NAMESPACE {

constexpr int kVectors = 2;                // vectors of a tile
constexpr int kWide = kVectors * kLanes;   // lanes of a tile
// Accumulators, vectors and one broadcast in 32 registers, or in 16. A block of scalars is packed as one vector.
constexpr int kBroadcasts = PRIVIMAGE_ISA_LEVEL == 2 ? 12 : PRIVIMAGE_ISA_LEVEL == 1 ? 6 : 4;
constexpr int kTile = kWide * kBroadcasts;
static_assert(kBroadcasts <= kLanes, "a block of scalars fits a vector");

// tile[j][lane] (+)= sum over n steps of s[j] * v[lane], v kVectors (or 1) vectors and s one vector a step. The sum of a
// call starts at zero and is added at its end: a long sum made of short ones has a smaller error. Not inlined: the
// compiler then keeps all accumulators in registers.
template <int NB, int NV>
static __attribute__((noinline)) void outer_products(const float* v, const float* s, int64_t n, float* tile, bool first) {
  vf acc[NB][NV];
#pragma GCC unroll 16
  for (int j = 0; j < NB; ++j)
#pragma GCC unroll 2
    for (int i = 0; i < NV; ++i) acc[j][i] = vf{};
  for (int64_t k = 0; k < n; ++k) {
    vf x[NV];
#pragma GCC unroll 2
    for (int i = 0; i < NV; ++i) x[i] = load<vf>(v + i * kLanes);
#pragma GCC unroll 16
    for (int j = 0; j < NB; ++j)
#pragma GCC unroll 2
      for (int i = 0; i < NV; ++i) acc[j][i] += x[i] * s[j];
    v += NV * kLanes;
    s += kLanes;
  }
#pragma GCC unroll 16
  for (int j = 0; j < NB; ++j)
#pragma GCC unroll 2
    for (int i = 0; i < NV; ++i) {
      float* at = tile + (j * NV + i) * kLanes;
      store(at, first ? acc[j][i] : acc[j][i] + load<vf>(at));
    }
}

}  // namespace ISA_NAMESPACE
}  // namespace privimage
