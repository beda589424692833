// ChaCha20 normals, 2 * kLanes blocks at a time.
//
// Both halves of the work are chains of dependent instructions, each far longer than a CPU looks ahead. So two sets of
// blocks run through ChaCha20 side by side, and Box-Muller goes stage by stage over sixteen vectors that wait in the
// first cache: a third less time than vector by vector (Zen 3).
#pragma once

#include <utility>

#include "../chacha20.h"
#include "../gaussian.h"
#include "simd.h"


namespace privimage {
namespace ISA_NAMESPACE {

constexpr int kNoiseBlocks = 2 * kLanes;                      // blocks per call of noise_batch
constexpr int kNoiseBatch = kNoiseBlocks * kNormalsPerBlock;  // normals
constexpr int kPairs = kNormalsPerBlock / 2;                  // of normals in a block
constexpr int kStages = kNoiseBatch / 2 / kDoubleLanes;       // vectors of pairs: 16

struct VectorMath {
  using D = vd;
  using F = vf;
  using U64 = vul;
  static HOST_DEVICE U64 bits(D v) { return reinterpret_cast<U64>(v); }
  static HOST_DEVICE D from_bits(U64 u) { return reinterpret_cast<D>(u); }
  static HOST_DEVICE D where_negative(U64 sign, D yes, D no) { return reinterpret_cast<vl>(sign) < 0 ? yes : no; }
  static HOST_DEVICE D sqrt(D v) {
    // Element by element: compilers merge it into one vector instruction, with -fno-math-errno.
    for (int i = 0; i < kDoubleLanes; ++i) v[i] = __builtin_sqrt(v[i]);
    return v;
  }
  static HOST_DEVICE F sqrt(F v) {
    for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
    return v;
  }
};

// Two vectors of ChaCha20 lanes, instruction by instruction in turn.
struct LanePair {
  vu a, b;
  HOST_DEVICE LanePair& operator+=(const LanePair& o) { a += o.a; b += o.b; return *this; }
  HOST_DEVICE LanePair& operator^=(const LanePair& o) { a ^= o.a; b ^= o.b; return *this; }
};
static HOST_DEVICE LanePair operator+(const LanePair& v, uint32_t s) { return {v.a + s, v.b + s}; }
static HOST_DEVICE LanePair operator+(const LanePair& v, const LanePair& o) { return {v.a + o.a, v.b + o.b}; }

// Whole bytes move by one shuffle where there is no rotation (AVX2); elsewhere the compiler has better.
template <int N, size_t... I>
static HOST_DEVICE vu rotate_lanes(vu v, std::index_sequence<I...>) {
#if PRIVIMAGE_ISA_LEVEL == 1
  if constexpr (N % 8 == 0) {
    typedef uint8_t bytes __attribute__((vector_size(sizeof(vu))));
    return reinterpret_cast<vu>(PRIVIMAGE_SHUFFLE(bytes, reinterpret_cast<bytes>(v), reinterpret_cast<bytes>(v), static_cast<uint8_t>((I & ~size_t{3}) | ((I - N / 8) & 3))...));
  }
#endif
  return (v << N) | (v >> (32 - N));
}

template <int N>
static HOST_DEVICE LanePair rotate_left(const LanePair& v) {
  using Bytes = std::make_index_sequence<sizeof(vu)>;
  return {rotate_lanes<N>(v.a, Bytes()), rotate_lanes<N>(v.b, Bytes())};
}

// Word w of the blocks from first on is at words[w][0 .. kNoiseBlocks-1].
static HOST_DEVICE void chacha20_words(const NoiseKey& noise, int64_t first, uint32_t (*words)[kNoiseBlocks]) {
  const uint32_t nonce[3] = {noise.stream, noise.rank, noise.step};
  uint32_t blocks[kNoiseBlocks];
  for (int i = 0; i < kNoiseBlocks; ++i) blocks[i] = static_cast<uint32_t>(first) + static_cast<uint32_t>(i);
  const LanePair counter = {load<vu>(blocks), load<vu>(blocks + kLanes)};
  LanePair out[16];
  chacha20_block<LanePair>(noise.key, counter, nonce, LanePair{vu{}, vu{}}, out);
  for (int w = 0; w < 16; ++w) {
    store(words[w], out[w].a);
    store(words[w] + kLanes, out[w].b);
  }
}

// Word w of kDoubleLanes blocks, widened: the even or the odd ones of the set that starts at block `set`. Splitting 64
// bits in place costs one instruction where widening takes up to four.
static HOST_DEVICE vul even_words(const uint32_t (*words)[kNoiseBlocks], int w, int set) {
  return load<vul>(words[w] + set) & 0xffffffffull;
}
static HOST_DEVICE vul odd_words(const uint32_t (*words)[kNoiseBlocks], int w, int set) {
  return load<vul>(words[w] + set) >> 32;
}

// The 8 normals of each of the blocks first .. first+kNoiseBlocks-1, in order, into out[kNoiseBatch].
static HOST_DEVICE void noise_batch(const NoiseKey& noise, int64_t first, double* out) {
  using M = VectorMath;
  alignas(64) uint32_t words[16][kNoiseBlocks];
  chacha20_words(noise, first, words);

  // Vector v: the even (v even) or odd blocks of one set, one of their pairs.
  vd e[kStages], m[kStages], d[kStages], cosine[kStages], sine[kStages];
  vul hi[kStages];
  for (int v = 0; v < kStages; v += 2) {
    const int set = v / (2 * kPairs) * kLanes, w = v / 2 % kPairs * 4;
    log_reduce<M>(even_words(words, w + 1, set), even_words(words, w, set) >> 11, e[v], m[v]);
    log_reduce<M>(odd_words(words, w + 1, set), odd_words(words, w, set) >> 11, e[v + 1], m[v + 1]);
    hi[v] = even_words(words, w + 3, set);
    hi[v + 1] = odd_words(words, w + 3, set);
    d[v] = turn_rest<M>(hi[v], even_words(words, w + 2, set) >> 11);
    d[v + 1] = turn_rest<M>(hi[v + 1], odd_words(words, w + 2, set) >> 11);
  }
  for (int v = 0; v < kStages; ++v) m[v] = log_ratio<M>(m[v]);
  for (int v = 0; v < kStages; ++v) m[v] = M::sqrt(minus_two_log<M>(e[v], m[v]));
  for (int v = 0; v < kStages; ++v) cos_sin_turn<M>(d[v], cosine[v], sine[v]);

  for (int set = 0; set < kNoiseBlocks; set += kLanes) {
    for (int odd = 0; odd < 2; ++odd) {
      vd normals[kNormalsPerBlock];  // one a register, its lanes blocks
      for (int i = 0; i < kPairs; ++i) {
        const int v = set / kLanes * 2 * kPairs + 2 * i + odd;
        turn_quarters<M>(hi[v], cosine[v], sine[v]);
        normals[2 * i] = m[v] * cosine[v];
        normals[2 * i + 1] = m[v] * sine[v];
      }
      for (int i = 0; i < kNormalsPerBlock; i += kDoubleLanes) {
        transpose_doubles(normals + i);
        for (int j = 0; j < kDoubleLanes; ++j)
          store(out + (set + 2 * j + odd) * kNormalsPerBlock + i, normals[i + j]);
      }
    }
  }
}

}  // namespace ISA_NAMESPACE
}  // namespace privimage
