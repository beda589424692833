// What conv_gram.cpp is made of: packing into doubles, channel by channel, and the Gram matrix of two packed lines.
#pragma once

#include "simd.h"

namespace privimage {
namespace ISA_NAMESPACE {

constexpr int kTileRows = 4;  // scalars of a tile: 4 x 3 vectors stay in 12 of 16 registers
constexpr int64_t kLineAlign = kDoubleLanes > kTileRows ? kDoubleLanes : kTileRows;

typedef uint16_t vu16_half __attribute__((vector_size(kLanes)));

static int64_t align_lanes(int64_t n) { return div_up(n, kLineAlign) * kLineAlign; }

static HOST_DEVICE vd load_doubles(const float* p) { return __builtin_convertvector(load<vf_half>(p), vd); }
static HOST_DEVICE vd load_doubles(const bf16* p) {
  const vu_half bits = __builtin_convertvector(load<vu16_half>(p), vu_half) << 16;
  return __builtin_convertvector(reinterpret_cast<vf_half>(bits), vd);
}

// dst[c * pitch + i] = src[from[i] + c * channel_stride], or 0 where from[i] is negative; i < lanes, whole vectors.
template <class T>
static void pack_line(double* dst, int64_t pitch, const T* src, const int64_t* from, int64_t lanes, int64_t channels,
                      int64_t channel_stride) {
  for (int64_t i = 0; i < lanes; i += kDoubleLanes, dst += kDoubleLanes, from += kDoubleLanes) {
    bool run = from[0] >= 0;
    for (int j = 1; j < kDoubleLanes; ++j) run = run && from[j] == from[0] + j;
    int64_t c = 0;
    if (run) {
      const T* at = src + from[0];
      for (; c < channels; ++c) store(dst + c * pitch, load_doubles(at + c * channel_stride));
    } else if (channel_stride == 1) {
      for (; c + kDoubleLanes <= channels; c += kDoubleLanes) {
        vd square[kDoubleLanes];
#pragma GCC unroll 8
        for (int j = 0; j < kDoubleLanes; ++j) square[j] = from[j] < 0 ? vd{} : load_doubles(src + from[j] + c);
        transpose_doubles(square);
#pragma GCC unroll 8
        for (int j = 0; j < kDoubleLanes; ++j) store(dst + (c + j) * pitch, square[j]);
      }
    }
    for (; c < channels; ++c)
      for (int j = 0; j < kDoubleLanes; ++j)
        dst[c * pitch + j] = from[j] < 0 ? 0.0 : static_cast<double>(to_float(src[from[j] + c * channel_stride]));
  }
}

// How a packed line lies in a Gram matrix: of each segment, `count` of its `lanes` values go to `low` and on.
struct LineLayout {
  int64_t segments, lanes, low, count;
  int64_t rows, columns, pitch;  // of a segment in the matrix; pitch of the whole
};

// Adds `channels` more inner products of four values at a with NV vectors at b; the first `rows` of the four are kept in
// out, `out_pitch` apart, vector n at column[n]. With one vector, two sums take turns: four would wait for each other.
template <int NV>
static void gram_tile(const double* a, const double* b, int64_t pitch, int64_t channels, bool first, double* out,
                      int64_t out_pitch, const int64_t* column, int64_t rows) {
  constexpr int kChains = NV == 1 ? 2 : 1;
  vd acc[kChains][kTileRows][NV] = {};
  int64_t c = 0;
  for (; c + kChains <= channels; c += kChains) {
#pragma GCC unroll 2
    for (int k = 0; k < kChains; ++k) {
      vd x[NV];
#pragma GCC unroll 3
      for (int n = 0; n < NV; ++n) x[n] = load<vd>(b + n * kDoubleLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
        for (int n = 0; n < NV; ++n) acc[k][r][n] += x[n] * a[r];
      a += pitch;
      b += pitch;
    }
  }
  if (kChains == 2 && c < channels)
    for (int r = 0; r < kTileRows; ++r) acc[0][r][0] += load<vd>(b) * a[r];
#pragma GCC unroll 4
  for (int r = 0; r < kTileRows; ++r) {
    if (r >= rows) return;
#pragma GCC unroll 3
    for (int n = 0; n < NV; ++n) {
      double* at = out + r * out_pitch + column[n];
      const vd sum = kChains == 2 ? acc[0][r][n] + acc[kChains - 1][r][n] : acc[0][r][n];
      store(at, first ? sum : load<vd>(at) + sum);
    }
  }
}

// Inner products over channels of every position of line a (a_segments of them count) with every one of line b.
static void gram(const double* a, const double* b, int64_t pitch, int64_t channels, int64_t a_segments,
                 const LineLayout& to, double* out) {
  constexpr int64_t kRun = 64;  // channels: what a run reads of both lines stays in the first cache
  const int64_t vectors = to.segments * to.lanes / kDoubleLanes;
  for (int64_t c = 0; c < channels; c += kRun) {
    const int64_t run = min64(kRun, channels - c);
    for (int64_t done = 0; done < vectors;) {
      const int64_t left = vectors - done, take = left == 1 ? 1 : left == 2 || left == 4 ? 2 : 3;
      auto* tile = take == 1 ? gram_tile<1> : take == 2 ? gram_tile<2> : gram_tile<3>;
      int64_t column[3] = {0, 0, 0};
      for (int64_t n = 0; n < take; ++n) {
        const int64_t at = (done + n) * kDoubleLanes;
        column[n] = to.low + at / to.lanes * to.columns + at % to.lanes;
      }
      const double* line = a + c * pitch;
      for (int64_t segment = 0; segment < a_segments; ++segment, line += to.lanes)
        for (int64_t i = 0; i < to.count; i += kTileRows)
          tile(line + i, b + c * pitch + done * kDoubleLanes, pitch, run, c == 0,
               out + (segment * to.rows + to.low + i) * to.pitch, to.pitch, column, to.count - i);
      done += take;
    }
  }
}

}  // namespace ISA_NAMESPACE
}  // namespace privimage
