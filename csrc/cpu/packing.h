// Copies a window of an image, channels innermost: the form in which every convolution kernel reads its operands.
#pragma once

#include "simd.h"

namespace privimage {
namespace ISA_NAMESPACE {

// One row of the batch, as the caller strides it.
struct Image {
  int64_t height, width, channel_stride, h_stride, w_stride;
};

// Positions (h0 + r, w0 + q), r < rows, q < cols, of an image; zero where that lies outside the image.
struct Window {
  int64_t h0, w0, rows, cols;
};

template <class T>
static HOST_DEVICE vf load_some(const T* p, int64_t n) {
  T values[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) values[i] = p[i];
  return load_floats(values);
}

// `count` positions along w of n channels, w_stride 1, into vectors `step` floats apart.
template <class T>
static HOST_DEVICE void pack_line(float* dst, int64_t step, const T* src, int64_t channel_stride, int64_t n, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    // The last vectors of a line start early and write some positions twice, rather than be filled one by one.
    if (i + kLanes > count && count >= kLanes) i = count - kLanes;
    const int64_t m = min64(kLanes, count - i);
    vf tile[kLanes];
    if (n == kLanes && m == kLanes) {
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) tile[j] = load_floats(src + j * channel_stride + i);
    } else {
      for (int j = 0; j < kLanes; ++j) {
        const T* line = src + j * channel_stride + i;
        tile[j] = j >= n ? vf{} : m == kLanes ? load_floats(line) : load_some(line, m);
      }
    }
    transpose(tile);
    if (m == kLanes) {
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) store(dst + (i + j) * step, tile[j]);
    } else {
      for (int64_t j = 0; j < m; ++j) store(dst + (i + j) * step, tile[j]);
    }
  }
}

// Channels 0 .. n-1 (n <= kLanes) of `src` as one vector per position: position (r, q) at dst + (r * pitch + q) * step.
// Lanes from n on hold anything.
template <class T>
static void pack_window(float* dst, int64_t step, int64_t pitch, const T* src, int64_t n, const Image& image,
                        const Window& window) {
  if (window.w0 == 0 && window.h0 == 0 && window.cols == image.width && window.rows == image.height && pitch == image.width &&
      image.height > 1 && image.h_stride == image.width * image.w_stride) {  // all of the image, one line in memory
    const int64_t size = image.height * image.width;
    return pack_window(dst, step, size, src, n, Image{1, size, image.channel_stride, 0, image.w_stride}, Window{0, 0, 1, size});
  }
  const int64_t left = min64(window.cols, max64(0, -window.w0));
  const int64_t right = max64(left, min64(window.cols, image.width - window.w0));
  for (int64_t r = 0; r < window.rows; ++r, dst += pitch * step) {
    const int64_t h = window.h0 + r;
    const bool inside = h >= 0 && h < image.height;
    for (int64_t q = 0; q < (inside ? left : window.cols); ++q) store(dst + q * step, vf{});
    if (!inside) continue;
    for (int64_t q = right; q < window.cols; ++q) store(dst + q * step, vf{});
    const T* line = src + h * image.h_stride + (window.w0 + left) * image.w_stride;
    float* to = dst + left * step;
    const int64_t count = right - left;
    if (image.channel_stride == 1) {
      // Whole vectors as long as they end within the line.
      const int64_t last = (count - 1) * image.w_stride + n - kLanes;
      const int64_t some = image.w_stride > 0 && last >= 0 ? min64(count, last / image.w_stride + 1) : 0;
      const int64_t whole = n == kLanes ? count : some;
      const T* pixel = line;
      int64_t q = 0;
      for (; q < whole; ++q, pixel += image.w_stride, to += step) store(to, load_floats(pixel));
      for (; q < count; ++q, pixel += image.w_stride, to += step) store(to, load_some(pixel, n));
    } else if (image.w_stride == 1) {
      pack_line(to, step, line, image.channel_stride, n, count);
    } else {
      for (int64_t q = 0; q < count; ++q) {
        float f[kLanes] = {};
        for (int64_t j = 0; j < n; ++j) f[j] = to_float(line[q * image.w_stride + j * image.channel_stride]);
        store(to + q * step, load<vf>(f));
      }
    }
  }
}

// The same for a pointer whose type is known at run time only; `offset` counts elements.
static inline void pack_window(float* dst, int64_t step, int64_t pitch, const void* base, DType dtype, int64_t offset,
                               int64_t n, const Image& image, const Window& window) {
  if (dtype == DType::bf16) {
    pack_window(dst, step, pitch, static_cast<const bf16*>(base) + offset, n, image, window);
  } else {
    pack_window(dst, step, pitch, static_cast<const float*>(base) + offset, n, image, window);
  }
}

}  // namespace ISA_NAMESPACE
}  // namespace privimage
