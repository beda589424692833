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

// Rows i .. i+3 times NV vectors from v. With one vector, two sums take turns: four would wait for each other.
template <int NV>
static void gram_tile(const double* a, const double* b, int64_t pitch, int64_t channels, int64_t i, int64_t v,
                      const LineLayout& to, double* out) {
  constexpr int kChains = NV == 1 ? 2 : 1;
  vd acc[kChains][kTileRows][NV] = {};
  const double* ap = a + i;
  const double* bp = b + v;
  int64_t c = 0;
  for (; c + kChains <= channels; c += kChains) {
#pragma GCC unroll 2
    for (int k = 0; k < kChains; ++k) {
      vd x[NV];
#pragma GCC unroll 3
      for (int n = 0; n < NV; ++n) x[n] = load<vd>(bp + n * kDoubleLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
        for (int n = 0; n < NV; ++n) acc[k][r][n] += x[n] * ap[r];
      ap += pitch;
      bp += pitch;
    }
  }
  if (kChains == 2 && c < channels)
    for (int r = 0; r < kTileRows; ++r) acc[0][r][0] += load<vd>(bp) * ap[r];
#pragma GCC unroll 4
  for (int r = 0; r < kTileRows; ++r) {
    const int64_t segment = (i + r) / to.lanes, row = (i + r) % to.lanes;
    if (row >= to.count) continue;
    double* line = out + (segment * to.rows + to.low + row) * to.pitch + to.low;
#pragma GCC unroll 3
    for (int n = 0; n < NV; ++n) {
      const int64_t column = v + n * kDoubleLanes;
      store(line + column / to.lanes * to.columns + column % to.lanes,
            kChains == 2 ? acc[0][r][n] + acc[kChains - 1][r][n] : acc[0][r][n]);
    }
  }
}

// Inner products over channels of every position of line a (a_segments of them count) with every one of line b.
static void gram(const double* a, const double* b, int64_t pitch, int64_t channels, int64_t a_segments,
                 const LineLayout& to, double* out) {
  const int64_t rows = a_segments * to.lanes, vectors = to.segments * to.lanes / kDoubleLanes;
  for (int64_t done = 0; done < vectors;) {
    const int64_t left = vectors - done, take = left == 1 ? 1 : left == 2 || left == 4 ? 2 : 3;
    auto* tile = take == 1 ? gram_tile<1> : take == 2 ? gram_tile<2> : gram_tile<3>;
    for (int64_t i = 0; i < rows; i += kTileRows) tile(a, b, pitch, channels, i, done * kDoubleLanes, to, out);
    done += take;
  }
}

}  // namespace ISA_NAMESPACE
}  // namespace privimage
