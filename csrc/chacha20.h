// The ChaCha20 block function, RFC 8439 section 2.3. U is uint32_t, or a vector of them: one block per lane.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace privimage {

// "expand 32-byte k"; four scalars, because device code cannot read a host array.
constexpr uint32_t kChaCha0 = 0x61707865u, kChaCha1 = 0x3320646eu, kChaCha2 = 0x79622d32u, kChaCha3 = 0x6b206574u;

template <int N, class U>
static HOST_DEVICE U rotate_left(U v) {
  return (v << N) | (v >> (32 - N));
}

template <class U>
static HOST_DEVICE void chacha_quarter_round(U& a, U& b, U& c, U& d) {
  a += b; d ^= a; d = rotate_left<16>(d);
  c += d; b ^= c; b = rotate_left<12>(b);
  a += b; d ^= a; d = rotate_left<8>(d);
  c += d; b ^= c; b = rotate_left<7>(b);
}

// counter: word 12; nonce: words 13..15. `zero` carries the type of a lane set to 0. Writes the 16 output words.
template <class U>
static HOST_DEVICE void chacha20_block(const uint32_t key[8], U counter, const uint32_t nonce[3], U zero, U out[16]) {
  // Only column 0 holds the counter, so the other columns of the first round are the same in every lane.
  uint32_t a1 = kChaCha1, b1 = key[1], c1 = key[5], d1 = nonce[0];
  uint32_t a2 = kChaCha2, b2 = key[2], c2 = key[6], d2 = nonce[1];
  uint32_t a3 = kChaCha3, b3 = key[3], c3 = key[7], d3 = nonce[2];
  chacha_quarter_round(a1, b1, c1, d1);
  chacha_quarter_round(a2, b2, c2, d2);
  chacha_quarter_round(a3, b3, c3, d3);
  U s0 = zero + kChaCha0, s1 = zero + a1, s2 = zero + a2, s3 = zero + a3;
  U s4 = zero + key[0], s5 = zero + b1, s6 = zero + b2, s7 = zero + b3;
  U s8 = zero + key[4], s9 = zero + c1, s10 = zero + c2, s11 = zero + c3;
  U s12 = counter, s13 = zero + d1, s14 = zero + d2, s15 = zero + d3;
  chacha_quarter_round(s0, s4, s8, s12);
  for (int i = 0;; ++i) {
    chacha_quarter_round(s0, s5, s10, s15);
    chacha_quarter_round(s1, s6, s11, s12);
    chacha_quarter_round(s2, s7, s8, s13);
    chacha_quarter_round(s3, s4, s9, s14);
    if (i == 9) break;
    chacha_quarter_round(s0, s4, s8, s12);
    chacha_quarter_round(s1, s5, s9, s13);
    chacha_quarter_round(s2, s6, s10, s14);
    chacha_quarter_round(s3, s7, s11, s15);
  }
  out[0] = s0 + kChaCha0; out[1] = s1 + kChaCha1;
  out[2] = s2 + kChaCha2; out[3] = s3 + kChaCha3;
  out[4] = s4 + key[0]; out[5] = s5 + key[1]; out[6] = s6 + key[2]; out[7] = s7 + key[3];
  out[8] = s8 + key[4]; out[9] = s9 + key[5]; out[10] = s10 + key[6]; out[11] = s11 + key[7];
  out[12] = s12 + counter; out[13] = s13 + nonce[0]; out[14] = s14 + nonce[1]; out[15] = s15 + nonce[2];
}

}  // namespace privimage
