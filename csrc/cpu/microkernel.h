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

// How far an operand moves along each axis of a run, in floats.
struct Walk {
  int64_t image, row, col;
};

// A run of positions, and the walks of the vector and the scalar operand.
struct Run {
  int64_t images, rows, cols;
  Walk v, s;
};

// The same over a run of positions of two images. kGather: scalar j is at s[at[j]], else at s[j].
template <int NB, int NV, bool kGather>
static __attribute__((noinline)) void outer_products_run(const Run& r, const float* v, const float* s, const int64_t* at,
                                                         float* tile, bool first) {
  vf acc[NB][NV];
  int64_t d[NB];
#pragma GCC unroll 16
  for (int j = 0; j < NB; ++j) {
    d[j] = kGather ? at[j] : j;
#pragma GCC unroll 2
    for (int i = 0; i < NV; ++i) acc[j][i] = vf{};
  }
  for (int64_t image = 0; image < r.images; ++image) {
    for (int64_t row = 0; row < r.rows; ++row) {
      const float* vp = v + image * r.v.image + row * r.v.row;
      const float* sp = s + image * r.s.image + row * r.s.row;
      for (int64_t col = 0; col < r.cols; ++col) {
        vf x[NV];
#pragma GCC unroll 2
        for (int i = 0; i < NV; ++i) x[i] = load<vf>(vp + i * kLanes);
#pragma GCC unroll 16
        for (int j = 0; j < NB; ++j) {
          const float scalar = kGather ? sp[d[j]] : sp[j];
#pragma GCC unroll 2
          for (int i = 0; i < NV; ++i) acc[j][i] += x[i] * scalar;
        }
        vp += r.v.col;
        sp += r.s.col;
      }
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < NB; ++j)
#pragma GCC unroll 2
    for (int i = 0; i < NV; ++i) {
      float* to = tile + (j * NV + i) * kLanes;
      store(to, first ? acc[j][i] : acc[j][i] + load<vf>(to));
    }
}

using OuterRun = void (*)(const Run&, const float*, const float*, const int64_t*, float*, bool);

template <int NV, bool kGather, int... J>
static OuterRun outer_run_of(int64_t count, Indices<J...>) {
  static constexpr OuterRun kByCount[] = {outer_products_run<J + 1, NV, kGather>...};
  return kByCount[count - 1];
}

// The kernel for tiles of `count` scalars and `lanes` lanes.
template <bool kGather>
static OuterRun outer_run(int64_t count, int64_t lanes) {
  using AllCounts = MakeIndices<kBroadcasts>::type;
  return lanes == kWide ? outer_run_of<kVectors, kGather>(count, AllCounts()) : outer_run_of<1, kGather>(count, AllCounts());
}

// Writes a line of weights, `step` floats apart, and adds the squares of what was written. No dst: the squares alone.
static HOST_DEVICE void write_weights(const float* values, int64_t n, float* dst, int64_t step, bool add, SquareSum& sq) {
  int64_t i = 0;
  if (!dst) {
    for (; i + kLanes <= n; i += kLanes) sq.add_vector(values + i);
  } else if (step == 1) {
    for (; i + kLanes <= n; i += kLanes) {
      const vf v = add ? load<vf>(values + i) + load<vf>(dst + i) : load<vf>(values + i);
      store(dst + i, v);
      sq.add_vector(v);
    }
  }
  for (; i < n; ++i) {
    float v = values[i];
    if (dst) {
      if (add) v += dst[i * step];
      dst[i * step] = v;
    }
    sq.add(v);
  }
}

}  // namespace ISA_NAMESPACE
}  // namespace privimage
