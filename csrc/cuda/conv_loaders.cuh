// How a block of conv_weight_grad.cu fetches its operands: kDepth positions a stage of a kM wide piece of g, and of a kN wide piece
// of the columns of x, each [position][channel], into a slot of shared memory. T is a tile of that file.
#pragma once

#include "conv_geometry.cuh"
#include "mma.cuh"

namespace privimage {
namespace DEVICE_NAMESPACE {

// Fetches element by element, with whatever strides there are.
template <class T>
struct ElementLoader {
  using Element = typename T::Element;
  const ConvGeometry& q;
  const Element* x;  // of the sample at hand, and its group
  const Element* g;
  int m0, n0, stages, stage = 0;

  __device__ __forceinline__ ElementLoader(const ConvGeometry& geometry, int stages_of_sample, int64_t sample, int group, int first_m, int first_n)
      : q(geometry), x(q.inputs<Element>(sample, group)), g(q.outputs<Element>(sample, group)), m0(first_m), n0(first_n),
        stages(stages_of_sample) {}

  // The next stage of the block's samples.
  __device__ __forceinline__ void load(Element* slot) {
    // Neighbouring threads take neighbours in memory.
    const bool g_across = q.g_stride[0] == 1, x_across = q.x_stride[0] == 1;
    for (int e = static_cast<int>(threadIdx.x); e < T::kDepth * T::kM; e += T::kBlock) {
      const int k = g_across ? e / T::kM : e % T::kDepth, m = g_across ? e % T::kM : e / T::kDepth;
      const int n = stage * T::kDepth + k;
      slot[k * T::kRowM + m] = n < q.positions && m0 + m < q.out_group ? g[q.output(ConvGeometry::Position(q, n), m0 + m)] : Element{};
    }
    for (int e = static_cast<int>(threadIdx.x); e < T::kDepth * T::kN; e += T::kBlock) {
      const int k = x_across ? e / T::kN : e % T::kDepth, c = x_across ? e % T::kN : e / T::kDepth;
      const int n = stage * T::kDepth + k;
      Element value{};
      if (n < q.positions && n0 + c < q.columns) {
        int64_t offset;
        if (q.input(ConvGeometry::Position(q, n), ConvGeometry::Column(q, n0 + c), offset)) value = x[offset];
      }
      slot[T::kDepth * T::kRowM + k * T::kRowN + c] = value;
    }
    if (++stage < stages) return;
    stage = 0;
    x += q.multiplicity * q.x_row;
    g += q.multiplicity * q.g_row;
  }
};

// Fetches chunks of 16 bytes. A thread always has the same channels of g and the same column of x, at positions that advance by
// kDepth from stage to stage. Where they lie is counted on by additions: a block has few warps, and computing addresses anew kept
// them longer than the products. g's positions are evenly spaced over all rows of a sample; x has edges.
template <class T>
struct ChunkLoader {
  using Element = typename T::Element;
  static constexpr int kChunk = 16 / sizeof(Element);
  static constexpr int kChunksM = T::kM / kChunk, kStrideM = T::kBlock / kChunksM, kPositionsM = T::kDepth / kStrideM;
  static constexpr int kChunksN = T::kN / kChunk, kStrideN = T::kBlock / kChunksN, kPositionsN = T::kDepth / kStrideN;
  static_assert(kPositionsM * kStrideM == T::kDepth && kPositionsN * kStrideN == T::kDepth, "every thread has as many chunks");

  // A position of a column of x: the input's place that it has there, elements from the beginning of its row, and that row.
  struct Cursor {
    int y, x, at;
    const Element* row;
  };
  // What a move adds.
  struct Move {
    int y, x, at;
  };

  const ConvGeometry& q;
  const Element *x_first, *g_first, *g_next;  // of the sample at hand, and its group; g_next: at the thread's next position
  Cursor cursors[kPositionsN];
  Move step, line, row;  // kDepth positions; on to the next line, where a line ends; and to the next row's first
  int y_begin, x_begin, y_end, x_end, channel;
  int stages, stage = 0;
  int g_position, x_position, g_limit, x_limit;  // a limit is 0 where the thread's channels are past the last
  int g_slot, x_slot;

  __device__ __forceinline__ ChunkLoader(const ConvGeometry& geometry, int stages_of_sample, int64_t sample, int group, int first_m, int first_n)
      : q(geometry), x_first(q.inputs<Element>(sample, group)), g_first(q.outputs<Element>(sample, group)), stages(stages_of_sample) {
    const int thread = static_cast<int>(threadIdx.x);
    const int g_channel = thread % kChunksM * kChunk, x_column = thread % kChunksN * kChunk;
    g_slot = thread / kChunksM * T::kRowM + g_channel;
    x_slot = T::kDepth * T::kRowM + thread / kChunksN * T::kRowN + x_column;
    g_first += first_m + g_channel;
    g_limit = first_m + g_channel < q.out_group ? q.positions : 0;
    x_limit = first_n + x_column < q.columns ? q.positions : 0;
    const ConvGeometry::Column column(q, first_n + x_column);
    const int down = q.stride[0], across = q.stride[1];
    int over;
    const int lines = q.out_width.divide(T::kDepth, over);
    step = {lines * down, over * across, lines * down * q.x_stride[1] + over * across * q.x_stride[2]};
    line = {down, -q.out_size[1] * across, down * q.x_stride[1] - q.out_size[1] * across * q.x_stride[2]};
    row = {-q.out_size[0] * down, 0, -q.out_size[0] * down * q.x_stride[1]};
    y_begin = column.dy;
    x_begin = column.dx;
    y_end = y_begin + q.out_size[0] * down;
    x_end = x_begin + q.out_size[1] * across;
    channel = column.channel;
    begin();
  }

  // At the first positions of the sample at hand.
  __device__ __forceinline__ void begin() {
    g_position = static_cast<int>(threadIdx.x) / kChunksM;
    x_position = static_cast<int>(threadIdx.x) / kChunksN;
    g_next = g_first + g_position * q.g_stride[2];
#pragma unroll
    for (int i = 0; i < kPositionsN; ++i) {
      const ConvGeometry::Position position(q, x_position + i * kStrideN);
      Cursor& at = cursors[i];
      at.y = position.y * q.stride[0] + y_begin;
      at.x = position.x * q.stride[1] + x_begin;
      at.at = at.y * q.x_stride[1] + at.x * q.x_stride[2] + channel;
      at.row = x_first + position.row * q.x_row;
    }
  }

  // The next stage of the block's samples. Nothing is read where a chunk is not kept, whatever its address.
  __device__ __forceinline__ void load(Element* slot) {
#pragma unroll
    for (int i = 0; i < kPositionsM; ++i) {
      const bool kept = g_position + i * kStrideM < g_limit;
      copy_async(slot + g_slot + i * kStrideM * T::kRowM, g_next + (kept ? i * kStrideM * q.g_stride[2] : 0), kept);
    }
    g_position += T::kDepth;
    g_next += T::kDepth * q.g_stride[2];
#pragma unroll
    for (int i = 0; i < kPositionsN; ++i) {
      Cursor& at = cursors[i];
      const bool kept = (x_position + i * kStrideN < x_limit) & (static_cast<unsigned>(at.y) < static_cast<unsigned>(q.in_size[0])) &
                        (static_cast<unsigned>(at.x) < static_cast<unsigned>(q.in_size[1]));
      copy_async(slot + x_slot + i * kStrideN * T::kRowN, at.row + (kept ? at.at : 0), kept);
      advance(at, step);
      if (at.x >= x_end) advance(at, line);
      while (at.y >= y_end) {
        advance(at, row);
        at.row += q.x_row;
      }
    }
    x_position += T::kDepth;
    if (++stage < stages) return;
    stage = 0;
    x_first += q.multiplicity * q.x_row;
    g_first += q.multiplicity * q.g_row;
    begin();
  }

  static __device__ __forceinline__ void advance(Cursor& at, const Move& by) {
    at.y += by.y;
    at.x += by.x;
    at.at += by.at;
  }
};

}  // namespace DEVICE_NAMESPACE
}  // namespace privimage
