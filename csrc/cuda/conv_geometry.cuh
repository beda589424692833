// A convolution as kernels see it: positions of a sample (K rows of output) and columns (kernel offset, input channel).
#pragma once

#include "../fast_div.h"
#include "launch.cuh"

namespace privimage {
namespace DEVICE_NAMESPACE {

struct ConvGeometry {
  // One column: its kernel offset as a shift of the input, and its channel in the group.
  struct Column {
    int channel, dy, dx;

    __device__ __forceinline__ Column(const ConvGeometry& q, int column) {
      int j;
      const int i = q.kernel_width.divide(q.per_offset.divide(column, channel), j);
      dy = i * q.dilation[0] - q.padding[0];
      dx = j * q.dilation[1] - q.padding[1];
    }
  };

  // One position: a row of the sample and a place in the output.
  struct Position {
    int row, y, x;

    __device__ __forceinline__ Position(const ConvGeometry& q, int position) {
      int within;
      row = q.per_row.divide(position, within);
      y = q.out_width.divide(within, x);
    }
  };

  const void* x;
  const void* g;
  int multiplicity, positions, groups;
  int in_group, out_group, columns;  // channels of a group; kernel offsets * in_group
  int in_size[2], out_size[2], stride[2], padding[2], dilation[2];
  int64_t x_row, g_row;
  int x_stride[3], g_stride[3];  // channel, height, width
  FastDiv per_row, out_width, per_offset, kernel_width;

  // Where in the sample's group x has this column at this position; false: padding.
  __device__ __forceinline__ bool input(const Position& at, const Column& column, int64_t& offset) const {
    const int y = at.y * stride[0] + column.dy, w = at.x * stride[1] + column.dx;
    offset = at.row * x_row + y * x_stride[1] + w * x_stride[2] + column.channel * x_stride[0];
    return static_cast<unsigned>(y) < static_cast<unsigned>(in_size[0]) && static_cast<unsigned>(w) < static_cast<unsigned>(in_size[1]);
  }

  __device__ __forceinline__ int64_t output(const Position& at, int channel) const {
    return at.row * g_row + at.y * g_stride[1] + at.x * g_stride[2] + channel * g_stride[0];
  }

  template <class Element>
  __device__ __forceinline__ const Element* inputs(int64_t sample, int group) const {
    return static_cast<const Element*>(x) + sample * multiplicity * x_row + int64_t{group} * in_group * x_stride[0];
  }
  template <class Element>
  __device__ __forceinline__ const Element* outputs(int64_t sample, int group) const {
    return static_cast<const Element*>(g) + sample * multiplicity * g_row + int64_t{group} * out_group * g_stride[0];
  }
};

static inline int narrow(const char* op, int64_t v) {
  if (v > 0x7fffffff || v < -0x7fffffff) throw std::runtime_error(std::string(op) + ": a size or stride is beyond 31 bits");
  return static_cast<int>(v);
}

// From ConvWeightGradParams or ConvGramParams.
template <class Params>
ConvGeometry conv_geometry(const char* op, const Params& p) {
  if (p.x_dtype != p.g_dtype) throw std::runtime_error(std::string(op) + ": x and g must have one dtype");
  ConvGeometry q{};
  q.x = p.x;
  q.g = p.g;
  q.multiplicity = narrow(op, p.multiplicity);
  q.positions = narrow(op, p.multiplicity * p.out_size[0] * p.out_size[1] + 256) - 256;  // tiles count past the end
  q.groups = narrow(op, p.groups);
  q.in_group = narrow(op, p.in_channels / p.groups);
  q.out_group = narrow(op, p.out_channels / p.groups);
  q.columns = narrow(op, p.kernel[0] * p.kernel[1] * q.in_group + 256) - 256;
  q.x_row = p.x_stride[0];
  q.g_row = p.g_stride[0];
  // Offsets within one row are ints.
  narrow(op, p.in_channels * p.x_stride[1] + p.in_size[0] * p.x_stride[2] + p.in_size[1] * p.x_stride[3]);
  narrow(op, p.out_channels * p.g_stride[1] + p.out_size[0] * p.g_stride[2] + p.out_size[1] * p.g_stride[3]);
  for (int i = 0; i < 2; ++i) {
    q.in_size[i] = narrow(op, p.in_size[i]);
    q.out_size[i] = narrow(op, p.out_size[i]);
    q.stride[i] = narrow(op, p.stride[i]);
    q.padding[i] = narrow(op, p.padding[i]);
    q.dilation[i] = narrow(op, p.dilation[i]);
  }
  for (int i = 0; i < 3; ++i) {
    q.x_stride[i] = narrow(op, p.x_stride[i + 1]);
    q.g_stride[i] = narrow(op, p.g_stride[i + 1]);
  }
  q.per_row = FastDiv(p.out_size[0] * p.out_size[1]);
  q.out_width = FastDiv(p.out_size[1]);
  q.per_offset = FastDiv(q.in_group);
  q.kernel_width = FastDiv(p.kernel[1]);
  return q;
}

}  // namespace DEVICE_NAMESPACE
}  // namespace privimage
