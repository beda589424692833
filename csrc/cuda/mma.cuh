// Warp-level matrix products and asynchronous copies (sm_80 on), each as one function with a host twin that computes
// what the hardware does.
//
// Fragments follow PTX: with group = lane / 4 and member = lane % 4, c holds rows group and group + 8, columns 2 member
// and 2 member + 1. Operands come from tiles that keep the contraction outermost, as NHWC tensors lie in memory.
//
// The matrix units add in float32 but cut what does not fit instead of rounding, so long sums drift towards zero. The
// kernels here start from zero every few steps and add up with ordinary, rounded additions.
#pragma once

#include "launch.cuh"

namespace privimage {
namespace DEVICE_NAMESPACE {

struct Accumulator {
  float c[4];
};

#ifndef PRIVIMAGE_EMULATE

// To the 10 mantissa bits of TF32, to nearest.
static __device__ __forceinline__ float to_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return __uint_as_float(bits);
}

// c (16×8) += a (16×16) · b (16×8)
static __device__ __forceinline__ void mma_bf16(Accumulator& d, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d.c[0]), "+f"(d.c[1]), "+f"(d.c[2]), "+f"(d.c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c (16×8) += a (16×8) · b (8×8)
static __device__ __forceinline__ void mma_tf32(Accumulator& d, const float (&a)[4], const float (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d.c[0]), "+f"(d.c[1]), "+f"(d.c[2]), "+f"(d.c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

// c (8×8) += a (8×4) · b (4×8) in double; a: row group, column member; b: row member, column group.
static __device__ __forceinline__ void mma_f64(double (&c)[2], double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
               : "+d"(c[0]), "+d"(c[1])
               : "d"(a), "d"(b));
}

// Four 8×8 matrices of 16-bit elements, transposed; lane 8i + r gives the address of row r of matrix i.
static __device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// 16 bytes from global to shared memory, or zeroes; src must be a valid address either way.
static __device__ __forceinline__ void copy_async(void* dst, const void* src, bool keep) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(dst));
  const int bytes = keep ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(src), "r"(bytes) : "memory");
}

static __device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
static __device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#else

static inline float to_tf32(float v) {
  const uint32_t bits = __float_as_uint(v);
  if ((bits & 0x7f800000u) == 0x7f800000u) return __uint_as_float(bits & 0x7fffffu ? 0x7fffffffu : bits);
  return __uint_as_float((bits + 0x1000u) & ~0x1fffu);  // to nearest, ties away from zero
}

// Double to float, towards zero: the sum inside the matrix unit.
static inline float cut(double v) {
  const float near = static_cast<float>(v);
  if (!(std::fabs(static_cast<double>(near)) > std::fabs(v)) || std::isinf(v)) return near;
  return std::nextafterf(near, 0.0f);
}

template <int kDepth>
static inline void multiply(const float (&a)[16][kDepth], const float (&b)[kDepth][8], float (&c)[16][8]) {
  for (int m = 0; m < 16; ++m) {
    double sum[8];
    for (int n = 0; n < 8; ++n) sum[n] = c[m][n];
    for (int k = 0; k < kDepth; ++k)
      for (int n = 0; n < 8; ++n) sum[n] += static_cast<double>(a[m][k]) * b[k][n];  // products are exact
    for (int n = 0; n < 8; ++n) c[m][n] = cut(sum[n]);
  }
}

template <class Operands>
static inline void gather(const Operands* const* in, float (&c)[16][8]) {
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) c[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2] = in[l]->c.c[i];
}

static inline void scatter(const float (&c)[16][8], Accumulator* const* out) {
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) out[l]->c[i] = c[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
}

struct Bf16Operands {
  Accumulator c;
  uint32_t a[4], b[2];
};

static inline void compute_bf16(const Bf16Operands* const* in, Accumulator* const* out) {
  float a[16][16], b[16][8], c[16][8];
  for (int l = 0; l < 32; ++l) {
    for (int i = 0; i < 8; ++i)
      a[l / 4 + i / 2 % 2 * 8][l % 4 * 2 + i % 2 + i / 4 * 8] = __uint_as_float(i % 2 ? in[l]->a[i / 2] & 0xffff0000u : in[l]->a[i / 2] << 16);
    for (int i = 0; i < 4; ++i)
      b[l % 4 * 2 + i % 2 + i / 2 * 8][l / 4] = __uint_as_float(i % 2 ? in[l]->b[i / 2] & 0xffff0000u : in[l]->b[i / 2] << 16);
  }
  gather(in, c);
  multiply(a, b, c);
  scatter(c, out);
}

static inline void mma_bf16(Accumulator& d, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  d = emulation::collective<Bf16Operands, Accumulator, compute_bf16>("mma_bf16", {d, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
}

struct Tf32Operands {
  Accumulator c;
  float a[4], b[2];
};

// The hardware reads the upper 19 bits of each operand.
static inline float upper(float v) { return __uint_as_float(__float_as_uint(v) & ~0x1fffu); }

static inline void compute_tf32(const Tf32Operands* const* in, Accumulator* const* out) {
  float a[16][8], b[8][8], c[16][8];
  for (int l = 0; l < 32; ++l) {
    for (int i = 0; i < 4; ++i) a[l / 4 + i % 2 * 8][l % 4 + i / 2 * 4] = upper(in[l]->a[i]);
    for (int i = 0; i < 2; ++i) b[l % 4 + i * 4][l / 4] = upper(in[l]->b[i]);
  }
  gather(in, c);
  multiply(a, b, c);
  scatter(c, out);
}

static inline void mma_tf32(Accumulator& d, const float (&a)[4], const float (&b)[2]) {
  d = emulation::collective<Tf32Operands, Accumulator, compute_tf32>("mma_tf32", {d, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
}

struct F64Operands {
  double c[2], a, b;
};

struct F64Result {
  double c[2];
};

static inline void compute_f64(const F64Operands* const* in, F64Result* const* out) {
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 2; ++i) {
      double sum = in[l]->c[i];
      for (int k = 0; k < 4; ++k) sum = std::fma(in[l / 4 * 4 + k]->a, in[(l % 4 * 2 + i) * 4 + k]->b, sum);
      out[l]->c[i] = sum;
    }
}

static inline void mma_f64(double (&c)[2], double a, double b) {
  const F64Result r = emulation::collective<F64Operands, F64Result, compute_f64>("mma_f64", {{c[0], c[1]}, a, b});
  c[0] = r.c[0];
  c[1] = r.c[1];
}

struct Matrices {
  uint32_t r[4];
};

static inline void compute_matrices(const void* const* const* in, Matrices* const* out) {
  for (int i = 0; i < 4; ++i)
    for (int l = 0; l < 32; ++l) {
      const uint16_t* first = static_cast<const uint16_t*>(*in[8 * i + l % 4 * 2]);
      const uint16_t* second = static_cast<const uint16_t*>(*in[8 * i + l % 4 * 2 + 1]);
      out[l]->r[i] = first[l / 4] | uint32_t{second[l / 4]} << 16;
    }
}

static inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) throw std::runtime_error("ldmatrix: a row is not aligned to 16 bytes");
  const Matrices m = emulation::collective<const void*, Matrices, compute_matrices>("ldmatrix", row);
  for (int i = 0; i < 4; ++i) r[i] = m.r[i];
}

static inline void copy_async(void* dst, const void* src, bool keep) { emulation::copy_async(dst, src, 16, !keep); }
static inline void commit_copies() { emulation::commit_copies(); }
template <int kPending>
static inline void wait_copies() {
  emulation::wait_copies(kPending);
}

#endif

}  // namespace DEVICE_NAMESPACE
}  // namespace privimage
