// One vector width per compilation: every file of cpu/ that includes this is built once per instruction set, with
// PRIVIMAGE_ISA set to baseline, avx2 or avx512. GCC vector extensions; intrinsics only where
// GCC 12 makes five instructions of one.
//
// Everything here is static or a type: a function the linker could merge across instruction sets would be a bug.
#pragma once

#include <cstdint>
#include <cstring>

#include "../host_device.h"
#include "../kernels.h"

#define PRIVIMAGE_PASTE_(a, b) a##b
#define PRIVIMAGE_PASTE(a, b) PRIVIMAGE_PASTE_(a, b)
#define ISA_NAMESPACE PRIVIMAGE_PASTE(isa_, PRIVIMAGE_ISA)

#define PRIVIMAGE_ISA_baseline 0
#define PRIVIMAGE_ISA_avx2 1
#define PRIVIMAGE_ISA_avx512 2
#define PRIVIMAGE_ISA_LEVEL PRIVIMAGE_PASTE(PRIVIMAGE_ISA_, PRIVIMAGE_ISA)

#if PRIVIMAGE_ISA_LEVEL > 0
#include <immintrin.h>
#endif

namespace privimage {
namespace ISA_NAMESPACE {

constexpr int kLanes = PRIVIMAGE_ISA_LEVEL == 2 ? 16 : PRIVIMAGE_ISA_LEVEL == 1 ? 8 : 4;  // floats in a vector
constexpr int kDoubleLanes = kLanes / 2;

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef double vd __attribute__((vector_size(kLanes * 4)));
typedef int64_t vl __attribute__((vector_size(kLanes * 4)));
typedef uint64_t vul __attribute__((vector_size(kLanes * 4)));
typedef float vf_half __attribute__((vector_size(kLanes * 2)));
typedef uint32_t vu_half __attribute__((vector_size(kLanes * 2)));
typedef uint16_t vu16 __attribute__((vector_size(kLanes * 2)));

template <class V, class T>
static HOST_DEVICE V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class T>
static HOST_DEVICE void store(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

static HOST_DEVICE vd to_double(vf_half v) {
#if PRIVIMAGE_ISA_LEVEL == 2
  return reinterpret_cast<vd>(_mm512_maskz_cvtps_pd(0xff, reinterpret_cast<__m256>(v)));  // the unmasked form warns
#elif PRIVIMAGE_ISA_LEVEL == 1
  return reinterpret_cast<vd>(_mm256_cvtps_pd(reinterpret_cast<__m128>(v)));
#else
  return vd{static_cast<double>(v[0]), static_cast<double>(v[1])};
#endif
}

struct bf16 {
  uint16_t bits;
};

static HOST_DEVICE vf load_floats(const float* p) { return load<vf>(p); }
static HOST_DEVICE vf load_floats(const bf16* p) {
  return reinterpret_cast<vf>(__builtin_convertvector(load<vu16>(p), vu) << 16);
}
static HOST_DEVICE float to_float(float v) { return v; }
static HOST_DEVICE float to_float(bf16 v) {
  const uint32_t u = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};

#if defined(__clang__)
#define PRIVIMAGE_SHUFFLE(T, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PRIVIMAGE_SHUFFLE(T, a, b, ...) __builtin_shuffle(a, b, T{__VA_ARGS__})
#endif

// Transposing a square of registers in log2 steps: step H exchanges the off-diagonal H-wide blocks of register pairs.
template <int H, int N, class V, class I, int... L>
static HOST_DEVICE void exchange(V& a, V& b, Indices<L...>) {
  const V low = PRIVIMAGE_SHUFFLE(I, a, b, ((L & H) == 0 ? L : N + L - H)...);
  b = PRIVIMAGE_SHUFFLE(I, a, b, ((L & H) == 0 ? L + H : N + L)...);
  a = low;
}

template <int H, int N, class V, class I>
static HOST_DEVICE void transpose_step(V* r) {
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i)
    if ((i & H) == 0) exchange<H, N, V, I>(r[i], r[i + H], typename MakeIndices<N>::type());
}

static HOST_DEVICE void transpose(vf (&r)[kLanes]) {
  transpose_step<1, kLanes, vf, vi>(r);
  transpose_step<2, kLanes, vf, vi>(r);
  if constexpr (kLanes > 4) transpose_step<(kLanes > 4 ? 4 : 1), kLanes, vf, vi>(r);
  if constexpr (kLanes > 8) transpose_step<(kLanes > 8 ? 8 : 1), kLanes, vf, vi>(r);
}

static HOST_DEVICE void transpose_doubles(vd* r) {
  transpose_step<1, kDoubleLanes, vd, vl>(r);
  if constexpr (kDoubleLanes > 2) transpose_step<(kDoubleLanes > 2 ? 2 : 1), kDoubleLanes, vd, vl>(r);
  if constexpr (kDoubleLanes > 4) transpose_step<(kDoubleLanes > 4 ? 4 : 1), kDoubleLanes, vd, vl>(r);
}

// Half a vector as doubles. Told element by element: of that, unlike of __builtin_convertvector, GCC makes one conversion.
template <int First, class F, int... L>
static HOST_DEVICE vd to_doubles(const F& f, Indices<L...>) {
  return vd{static_cast<double>(f[First + L])...};
}

// Sum of squares in double, whatever the ISA's width.
struct SquareSum {
  vd lanes = vd{};
  double scalar = 0;
  template <class F>
  HOST_DEVICE void add_halves(const F& f) {
    using Half = typename MakeIndices<kDoubleLanes>::type;
    const vd a = to_doubles<0>(f, Half()), b = to_doubles<kDoubleLanes>(f, Half());
    lanes += a * a + b * b;
  }
  HOST_DEVICE void add_vector(const float* p) { add_halves(p); }
  HOST_DEVICE void add_vector(vf v) { add_halves(v); }
  HOST_DEVICE void add(float v) { scalar += static_cast<double>(v) * static_cast<double>(v); }
  HOST_DEVICE double total() const {
    double t = scalar;
    for (int i = 0; i < kDoubleLanes; ++i) t += lanes[i];
    return t;
  }
};

static HOST_DEVICE double square_sum(const float* p, int64_t n) {
  SquareSum sum;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum.add_vector(p + i);
  for (; i < n; ++i) sum.add(p[i]);
  return sum.total();
}

static HOST_DEVICE int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static HOST_DEVICE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static HOST_DEVICE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace ISA_NAMESPACE
}  // namespace privimage
