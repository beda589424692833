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

struct ScalarMath {
  using D = double;
  using F = float;
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
  static HOST_DEVICE D where_negative(U64 sign, D yes, D no) { return (sign >> 63) ? yes : no; }
  static HOST_DEVICE D sqrt(D v) {
#if defined(__CUDA_ARCH__)
    return ::sqrt(v);
#else
    return __builtin_sqrt(v);
#endif
  }
  static HOST_DEVICE F sqrt(F v) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(v);
#else
    return __builtin_sqrtf(v);
#endif
  }
};

// An integer put into the mantissa of a power of two is that power plus the integer times its last place: exact, and
// one subtraction away from the scaled integer.
constexpr uint64_t kTwo52Bits = 0x4330000000000000ull;   // last place 1
constexpr uint64_t kTwo20Bits = 0x4130000000000000ull;   // last place 2^-32
constexpr uint64_t kHalfBits = 0x3fe0000000000000ull;    // last place 2^-53
constexpr uint64_t kSignBit = 0x8000000000000000ull;

// A uniform is u = (m + 0.5) * 2^-53 for a 53-bit m, of which hi is the upper 32 bits and lo the lower 21.
// This is lo's share of it, half a step included.
template <class M>
static HOST_DEVICE typename M::D low_part(typename M::U64 lo) {
  return M::from_bits(lo | kHalfBits) - 0x1.fffffffffffffp-2;
}

// The functions below are cut into stages, because a CPU runs each over many lanes before the next (cpu/noise.h).

// u = 2^e * m with m in [sqrt(1/2), sqrt(2)). u is in (0, 1], so log never sees 0.
template <class M>
static HOST_DEVICE void log_reduce(typename M::U64 hi, typename M::U64 lo, typename M::D& e, typename M::D& m) {
  using D = typename M::D;
  using U64 = typename M::U64;
  const D u = (M::from_bits(hi | kTwo20Bits) - 0x1p20) + low_part<M>(lo);
  const U64 shifted = M::bits(u) + 0x00095f619980c433ull;  // moves sqrt(1/2) to a power of two
  e = M::from_bits((shifted >> 52) | kTwo52Bits) - (0x1p52 + 1023.0);
  m = M::from_bits((shifted & 0x000fffffffffffffull) + 0x3fe6a09e667f3bcdull);
}

// log m = 2 atanh of this.
template <class M>
static HOST_DEVICE typename M::D log_ratio(typename M::D m) {
  return (m - 1.0) / (m + 1.0);
}

// -2 log u, from e and the ratio.
template <class M>
static HOST_DEVICE typename M::D minus_two_log(typename M::D e, typename M::D s) {
  using D = typename M::D;
  const D z = s * s;
  const D z2 = z * z;
  const D low = (-0x1.5555555555558p+0 + z * -0x1.99999999952d7p-1) +
                z2 * (-0x1.2492492df281ap-1 + z * -0x1.c71c62e3f11e6p-2);
  const D high = (-0x1.7462b51cb66b1p-2 + z * -0x1.39fe51a7c18f9p-2) + z2 * -0x1.2b5900de53b32p-2;
  const D tail = s * z * (low + (z2 * z2) * high);
  // log 2 in two parts, the first short enough for an exact product with e.
  return e * -0x1.62e42fee00000p+0 + (-4.0 * s + (tail + e * -0x1.a39ef35793c76p-32));
}

// The upper word of an angle's uniform, moved by an eighth of a turn. Bits 30 and 31: the nearest quarter turn; below:
// the rest, an eighth too large.
template <class M>
static HOST_DEVICE typename M::U64 eighths(typename M::U64 hi) {
  return hi + (1ull << 29);
}

// The angle less its nearest quarter turn, in turns: within an eighth. Exact, because the quarter is taken off the integer.
template <class M>
static HOST_DEVICE typename M::D turn_rest(typename M::U64 hi, typename M::U64 lo) {
  return (M::from_bits((eighths<M>(hi) & 0x3fffffffull) | kTwo20Bits) - (0x1p20 + 0.125)) + low_part<M>(lo);
}

// cos and sin of 2*pi*d for d within an eighth.
template <class M>
static HOST_DEVICE void cos_sin_turn(typename M::D d, typename M::D& cosine, typename M::D& sine) {
  using D = typename M::D;
  const D z = d * d;
  const D z2 = z * z;
  const D z4 = z2 * z2;
  const D sp = ((-0x1.4abbce625be52p+5 + z * 0x1.466bc6775a476p+6) +
                z2 * (-0x1.32d2cce50019dp+6 + z * 0x1.50783208533c5p+5)) +
               z4 * (-0x1.e3027dab81c1dp+3 + z * 0x1.e4a9bd16ce9f7p+1);
  const D cp = ((-0x1.3bd3cc9be45dep+4 + z * 0x1.03c1f081b5ac0p+6) +
                z2 * (-0x1.55d3c7e3cb23fp+6 + z * 0x1.e1f5068688925p+5)) +
               z4 * ((-0x1.a6d1eef43193ep+4 + z * 0x1.f9ce24161feb0p+2) + z2 * -0x1.b2f3d15e072b2p+0);
  sine = d * 0x1.921fb54442d18p+2 + d * z * sp;
  cosine = 1.0 + z * cp;
}

// Puts the quarter turns back: odd ones exchange the two, and each has its signs.
template <class M>
static HOST_DEVICE void turn_quarters(typename M::U64 hi, typename M::D& cosine, typename M::D& sine) {
  using D = typename M::D;
  using U64 = typename M::U64;
  const U64 t = eighths<M>(hi);
  const U64 odd = t << 33, half = t << 32;  // in the sign bit: is it an odd quarter; is it beyond half a turn
  const D c = M::where_negative(odd, sine, cosine), s = M::where_negative(odd, cosine, sine);
  sine = M::from_bits(M::bits(s) ^ (half & kSignBit));
  cosine = M::from_bits(M::bits(c) ^ ((odd ^ half) & kSignBit));
}

// Two normals from four 32-bit words: (w1:w0) is the radius' uniform, (w3:w2) the angle's, each the top 53 of 64 bits.
template <class M>
static HOST_DEVICE void box_muller(typename M::U64 w0, typename M::U64 w1, typename M::U64 w2, typename M::U64 w3,
                                   typename M::D& n0, typename M::D& n1) {
  using D = typename M::D;
  D e, m, cosine, sine;
  log_reduce<M>(w1, w0 >> 11, e, m);
  const D radius = M::sqrt(minus_two_log<M>(e, log_ratio<M>(m)));
  cos_sin_turn<M>(turn_rest<M>(w3, w2 >> 11), cosine, sine);
  turn_quarters<M>(w3, cosine, sine);
  n0 = radius * cosine;
  n1 = radius * sine;
}

}  // namespace privimage
