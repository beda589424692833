// The end of a residual block: (a + b + biases) * scale in one pass, and backward the one gradient that a and b share, with its
// sum over each image's positions, which is that image's gradient of either bias.
#include "images.cuh"

namespace privimage {
namespace DEVICE_NAMESPACE {
namespace {

template <class T>
__global__ void __launch_bounds__(kImageThreads) residual_kernel(ResidualParams p) {
  const Place place(p.channels);
  if (!place.works) return;
  const int64_t image = int64_t{blockIdx.x} * p.positions * p.channels;
  T* out = static_cast<T*>(p.out) + image;
  const float scale = p.scale;
  float bias[kVector];
  for (int i = 0; i < kVector; ++i)
    bias[i] = (p.bias_a ? p.bias_a[place.channel(i)] : 0.0f) + (p.bias_b ? p.bias_b[place.channel(i)] : 0.0f);
  each_position<true>(
      p.positions, p.channels, place, static_cast<const T*>(p.a) + image, static_cast<const T*>(p.b) + image,
      [&](const Chunk<T>& a, const Chunk<T>& b, int64_t s) {
        Chunk<T> sum;
#pragma unroll
        for (int i = 0; i < kVector; i += 2) {
          const float first = value_of(a, i) + value_of(b, i) + bias[i];
          const float second = value_of(a, i + 1) + value_of(b, i + 1) + bias[i + 1];
          set_pair(sum, i, first * scale, second * scale);
        }
        store(out, s, p.channels, place, sum);
      });
}

template <class T>
__global__ void __launch_bounds__(kImageThreads) residual_backward_kernel(ResidualParams p) {
  DYNAMIC_SHARED(memory);
  const Place place(p.channels);
  const ChannelSums sums(memory, p.channels, place);
  const int64_t row = blockIdx.x, image = row * p.positions * p.channels;
  const T* g = static_cast<const T*>(p.g) + image;
  T* d = static_cast<T*>(p.d) + image;
  const float scale = p.scale;
  float total[kVector], none[kVector];
  for (int i = 0; i < kVector; ++i) total[i] = none[i] = 0;
  if (place.works) {
    each_position<false>(p.positions, p.channels, place, g, g, [&](const Chunk<T>& v, const Chunk<T>&, int64_t s) {
      Chunk<T> out;
#pragma unroll
      for (int i = 0; i < kVector; i += 2) {
        const float first = value_of(v, i) * scale, second = value_of(v, i + 1) * scale;
        total[i] += first;
        total[i + 1] += second;
        set_pair(out, i, first, second);
      }
      if (p.d) store(d, s, p.channels, place, out);
    });
  }
  add_up(sums, place, p.channels, total, none);
  for (int64_t c = threadIdx.x; c < p.channels; c += kImageThreads)
    p.bias_rows[row * p.channels + c] = static_cast<float>(sums.whole[c]);
}

template <class T>
void launch(const char* op, const ResidualParams& p, void* stream) {
  const unsigned grid = blocks_of(op, p.rows);
  if (p.g) {
    LAUNCH(op, residual_backward_kernel<T>, grid, kImageThreads, image_shared(p.channels, 0), stream, p);
  } else {
    LAUNCH(op, residual_kernel<T>, grid, kImageThreads, 0, stream, p);
  }
}

}  // namespace

void residual(const ResidualParams& p, void* stream) {
  const char* op = __func__;
  check_channels(op, p.channels);
  if (p.rows == 0 || p.positions == 0) return;
  p.dtype == DType::bf16 ? launch<uint16_t>(op, p, stream) : launch<float>(op, p, stream);
}

}  // namespace DEVICE_NAMESPACE
}  // namespace privimage
