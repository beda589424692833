// Standard normals from ChaCha20 words by Box-Muller, in plain IEEE double +, -, *, /, sqrt.
//
// libm's log and sin differ between machines and between CPU and GPU; these do not, as long as the file is compiled
// without fused multiply-add contraction. So one key gives one noise everywhere, which is what lets a GPU or AVX-512
// result be checked against the baseline bit by bit.
//
// M names the arithmetic: ScalarMath below, or a vector of lanes (cpu/noise.h). Polynomials are minimax fits made for
// these intervals; their error is below 2e-17 relative, under the rounding of the arithmetic around them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace privimage {

constexpr int kNormalsPerBlock = 8;
constexpr int64_t kMaxBlocks = int64_t{1} << 32;  // word 12 of the state is the block number

struct ScalarMath {
  using D = double;
  using U64 = uint64_t;
  static HOST_DEVICE U64 bits(D v) {
#if defined(__CUDA_ARCH__)
    return static_cast<U64>(__double_as_longlong(v));
#else
    U64 u;
    std::memcpy(&u, &v, sizeof u);
    return u;
#endif
  }
  static HOST_DEVICE D from_bits(U64 u) {
#if defined(__CUDA_ARCH__)
    return __longlong_as_double(static_cast<long long>(u));
#else
    D v;
    std::memcpy(&v, &u, sizeof v);
    return v;
#endif
  }
  static HOST_DEVICE D sqrt(D v) {
#if defined(__CUDA_ARCH__)
    return ::sqrt(v);
#else
    return __builtin_sqrt(v);
#endif
  }
};

constexpr uint64_t kTwo52Bits = 0x4330000000000000ull;  // 2^52: its low bits hold an integer exactly
constexpr double kTwo52 = 4503599627370496.0;

// (m + 0.5) * 2^-53 for the 53-bit m made of hi (32 bits) and lo (21 bits). In (0, 1]: log never sees 0.
template <class M>
static HOST_DEVICE typename M::D uniform53(typename M::U64 hi, typename M::U64 lo) {
  const typename M::D h = M::from_bits(hi | kTwo52Bits) - kTwo52;
  const typename M::D l = M::from_bits(lo | kTwo52Bits) - (kTwo52 - 0.5);
  return (h * 2097152.0 + l) * 0x1p-53;
}

// Natural logarithm of u in [2^-54, 1]: u = 2^e * m with m in [sqrt(1/2), sqrt(2)), log m = 2 atanh((m-1)/(m+1)).
template <class M>
static HOST_DEVICE typename M::D log_unit(typename M::D u) {
  using D = typename M::D;
  using U64 = typename M::U64;
  const U64 shifted = M::bits(u) + 0x00095f619980c433ull;  // moves sqrt(1/2) to a power of two
  const D e = M::from_bits((shifted >> 52) | kTwo52Bits) - (kTwo52 + 1023.0);
  const D m = M::from_bits((shifted & 0x000fffffffffffffull) + 0x3fe6a09e667f3bcdull);
  const D s = (m - 1.0) / (m + 1.0);
  const D z = s * s;
  const D z2 = z * z;
  const D low = (0x1.5555555555558p-1 + z * 0x1.99999999952d7p-2) + z2 * (0x1.2492492df281ap-2 + z * 0x1.c71c62e3f11e6p-3);
  const D high = (0x1.7462b51cb66b1p-3 + z * 0x1.39fe51a7c18f9p-3) + z2 * 0x1.2b5900de53b32p-3;
  const D tail = s * z * (low + (z2 * z2) * high);
  return e * 0x1.62e42fee00000p-1 + (2.0 * s + (tail + e * 0x1.a39ef35793c76p-33));
}

// cos and sin of 2*pi*u for u in [0, 1]: nearest quarter turn removed exactly, the rest within an eighth of a turn.
template <class M>
static HOST_DEVICE void cos_sin_turn(typename M::D u, typename M::D& cosine, typename M::D& sine) {
  using D = typename M::D;
  using U64 = typename M::U64;
  const D magic = u * 4.0 + 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer in the low bits
  const U64 quadrant = M::bits(magic);
  const D d = u - (magic - 6755399441055744.0) * 0.25;
  const D z = d * d;
  const D z2 = z * z;
  const D z4 = z2 * z2;
  const D sp = ((-0x1.4abbce625be52p+5 + z * 0x1.466bc6775a476p+6) + z2 * (-0x1.32d2cce50019dp+6 + z * 0x1.50783208533c5p+5)) +
               z4 * (-0x1.e3027dab81c1dp+3 + z * 0x1.e4a9bd16ce9f7p+1);
  const D cp = ((-0x1.3bd3cc9be45dep+4 + z * 0x1.03c1f081b5ac0p+6) + z2 * (-0x1.55d3c7e3cb23fp+6 + z * 0x1.e1f5068688925p+5)) +
               z4 * ((-0x1.a6d1eef43193ep+4 + z * 0x1.f9ce24161feb0p+2) + z2 * -0x1.b2f3d15e072b2p+0);
  const U64 s_bits = M::bits(d * 0x1.921fb54442d18p+2 + d * z * sp);
  const U64 c_bits = M::bits(1.0 + z * cp);
  const U64 swap = (s_bits ^ c_bits) & (U64{} - (quadrant & 1));  // odd quarter turns exchange the two
  const U64 s_sign = (quadrant & 2) << 62;
  const U64 c_sign = ((quadrant + 1) & 2) << 62;
  sine = M::from_bits((s_bits ^ swap) ^ s_sign);
  cosine = M::from_bits((c_bits ^ swap) ^ c_sign);
}

// Two normals from four 32-bit words: (w1:w0) is the radius' uniform, (w3:w2) the angle's, each the top 53 of 64 bits.
template <class M>
static HOST_DEVICE void box_muller(typename M::U64 w0, typename M::U64 w1, typename M::U64 w2, typename M::U64 w3,
                                   typename M::D& n0, typename M::D& n1) {
  using D = typename M::D;
  const D radius = M::sqrt(log_unit<M>(uniform53<M>(w1, w0 >> 11)) * -2.0);
  D cosine, sine;
  cos_sin_turn<M>(uniform53<M>(w3, w2 >> 11), cosine, sine);
  n0 = radius * cosine;
  n1 = radius * sine;
}

}  // namespace privimage
