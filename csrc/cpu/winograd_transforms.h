// One-dimensional transforms of the Winograd weight gradient: three gradient taps from M positions of g.
//
//   w[k] = sum over t < M of g[t] * x[t + k], k = 0..2,  costs M + 2 products instead of 3 M:
//   w = weight(gradient(g) * input(x)).
//
// gradient evaluates the polynomial with coefficients g at M + 1 points and takes its last coefficient (the point at
// infinity); input holds the Lagrange numerators, and their denominators are in weight, which runs once a sample. Each
// step is a short chain of multiply-adds on vectors of channels; two dimensions are rows of columns.
#pragma once

#include "simd.h"

namespace privimage {
namespace ISA_NAMESPACE {

template <int M>
struct Transform;

template <>
struct Transform<2> {  // points 0, +-1, infinity
  static HOST_DEVICE void input(const vf* x, vf* y) {
    y[0] = x[2] - x[0];
    y[1] = x[2] + x[1];
    y[2] = x[2] - x[1];
    y[3] = x[3] - x[1];
  }
  static HOST_DEVICE void gradient(const vf* g, vf* y) {
    y[0] = g[0];
    y[1] = g[0] + g[1];
    y[2] = g[0] - g[1];
    y[3] = g[1];
  }
  static HOST_DEVICE void weight(const vf* m, vf* w) {
    const vf even = (m[1] + m[2]) * 0.5f;
    w[0] = even - m[0];
    w[1] = (m[1] - m[2]) * 0.5f;
    w[2] = even + m[3];
  }
};

template <>
struct Transform<4> {
  // Points 0, +-s, +-t, infinity. With s = 3/4, t = 3/2 the error is half of that with the usual 1 and 2, at the same
  // cost: the powers up to s^3 and t^3 stay near 1, and every coefficient but the denominators is exact.
  static constexpr float s = 0.75f, t = 1.5f, s2 = s * s, t2 = t * t;
  static constexpr float at_0 = 1 / (s2 * t2), at_s = 1 / (2 * s2 * (s2 - t2)), at_t = 1 / (2 * t2 * (t2 - s2));

  static HOST_DEVICE void input(const vf* x, vf* y) {
    y[0] = (x[4] - x[2] * (s2 + t2)) + x[0] * (s2 * t2);
    const vf even_s = x[4] - x[2] * t2, odd_s = (x[3] - x[1] * t2) * s;
    y[1] = even_s + odd_s;
    y[2] = even_s - odd_s;
    const vf even_t = x[4] - x[2] * s2, odd_t = (x[3] - x[1] * s2) * t;
    y[3] = even_t + odd_t;
    y[4] = even_t - odd_t;
    y[5] = (x[5] - x[3] * (s2 + t2)) + x[1] * (s2 * t2);
  }
  static HOST_DEVICE void gradient(const vf* g, vf* y) {
    y[0] = g[0];
    const vf even_s = g[0] + g[2] * s2, odd_s = (g[1] + g[3] * s2) * s;
    y[1] = even_s + odd_s;
    y[2] = even_s - odd_s;
    const vf even_t = g[0] + g[2] * t2, odd_t = (g[1] + g[3] * t2) * t;
    y[3] = even_t + odd_t;
    y[4] = even_t - odd_t;
    y[5] = g[3];
  }
  static HOST_DEVICE void weight(const vf* m, vf* w) {
    const vf even_s = (m[1] + m[2]) * at_s, even_t = (m[3] + m[4]) * at_t;
    w[0] = m[0] * at_0 + (even_s + even_t);
    w[1] = (m[1] - m[2]) * (at_s * s) + (m[3] - m[4]) * (at_t * t);
    w[2] = even_s * s2 + (even_t * t2 + m[5]);
  }
};

// y[i][j] at y + (i * (M + 2) + j) * point: the input tile whose first position is x, neighbours `step` and `pitch` floats
// away.
template <int M>
static HOST_DEVICE void transform_input(const float* x, int64_t step, int64_t pitch, float* y, int64_t point) {
  constexpr int N = M + 2;
  vf half[N][N];
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) {
    vf column[N], out[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) column[i] = load<vf>(x + i * pitch + j * step);
    Transform<M>::input(column, out);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) half[i][j] = out[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    vf out[N];
    Transform<M>::input(half[i], out);
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) store(y + (i * N + j) * point, out[j]);
  }
}

template <int M>
static HOST_DEVICE void transform_gradient(const float* g, int64_t step, int64_t pitch, float* y, int64_t point) {
  constexpr int N = M + 2;
  vf half[N][M];
#pragma GCC unroll 8
  for (int j = 0; j < M; ++j) {
    vf column[M], out[N];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) column[i] = load<vf>(g + i * pitch + j * step);
    Transform<M>::gradient(column, out);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) half[i][j] = out[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    vf out[N];
    Transform<M>::gradient(half[i], out);
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) store(y + (i * N + j) * point, out[j]);
  }
}

// w[3 * i + j] from the sums of products, neighbours `point` floats apart.
template <int M>
static HOST_DEVICE void transform_weight(const float* m, int64_t point, vf* w) {
  constexpr int N = M + 2;
  vf half[3][N];
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) {
    vf column[N], out[3];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) column[i] = load<vf>(m + (i * N + j) * point);
    Transform<M>::weight(column, out);
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) half[i][j] = out[i];
  }
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) Transform<M>::weight(half[i], w + 3 * i);
}

}  // namespace ISA_NAMESPACE
}  // namespace privimage
