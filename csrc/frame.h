// Includes the C library only: the arithmetic of the frame path, for the GPU and the CPU.
//
// This header is the definition. The CUDA kernels and the portable host level call these functions;
// the AVX levels do the same operations in the same order, so that every level gives the same bits.
// Nothing may be contracted behind its back: fmaf is written where a fused operation is meant, and
// the compilers are told to fuse nothing else (-ffp-contract=off, --fmad=false).
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define FRAME_FN __host__ __device__ __forceinline__
#else
#define FRAME_FN inline __attribute__((always_inline))
#endif

namespace efficientad {

// Where each output cell of one axis reads: spans holds (first source cell, count) per output cell,
// weights holds `width` numbers per output cell, of which `count` are used and sum to 1.
struct Taps {
  const int32_t* spans;
  const float* weights;
  int32_t width;
  int32_t size;  // output cells
};

struct Frame {
  const uint8_t* data;  // interleaved pixels of `channels` bytes, rows `pitch` bytes apart
  int64_t pitch;
  int32_t height, width, channels;  // channels is 3 (RGB) or 1 (grey, shown as RGB)
};

struct Normal {
  float mean[3], std[3];  // of levels scaled to 0..1
};

enum Kind : int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

// A packed image: (height + 2 border, width + 2 border, channels), contiguous.
struct Packed {
  void* data;
  int32_t height, width, border, channels, kind;
};

namespace {  // internal linkage: a level compiled for AVX-512 must not be linked into another one

// One column of one channel over the source rows of an output row.
FRAME_FN float column_sum(const uint8_t* at, int64_t pitch, const float* weights, int32_t count) {
  float sum = 0.0f;
  for (int32_t k = 0; k < count; ++k)
    sum = fmaf(weights[k], static_cast<float>(at[k * pitch]), sum);
  return sum;
}

// One output cell of one channel over a source row, whose pixels are `step` apart.
template <class Value>
FRAME_FN float row_sum(const Value* at, int32_t step, const float* weights, int32_t count) {
  float sum = 0.0f;
  for (int32_t k = 0; k < count; ++k)
    sum = fmaf(weights[k], static_cast<float>(at[k * step]), sum);
  return sum;
}

// The whole level of a sum, as Pillow rounds after each of its passes. Sums are not negative.
FRAME_FN float whole(float sum) { return floorf(sum + 0.5f); }

// The order and the two true divisions of reference.pack.
FRAME_FN float normalised(float level, float mean, float std) {
  return (level / 255.0f - mean) / std;
}

FRAME_FN uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

// float16, rounded to nearest even; beyond the largest value infinity. Not for NaN.
FRAME_FN uint16_t half_bits(float value) {
#ifdef __CUDA_ARCH__
  return __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  if (size >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65536 and above
  if (size < 0x38800000u) {  // below 2^-14: the spacing is 2^-24, which is that of floats at 1/2
    float magnitude;
    memcpy(&magnitude, &size, 4);
    return static_cast<uint16_t>(sign | (float_bits(magnitude + 0.5f) - 0x3f000000u));
  }
  const uint32_t rounded = size + 0xfffu + ((size >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
#endif
}

// bfloat16, rounded to nearest even. Not for NaN.
FRAME_FN uint16_t bfloat_bits(float value) {
  const uint32_t bits = float_bits(value);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

FRAME_FN void store(void* out, int64_t index, float value, int32_t kind) {
  if (kind == kFloat32)
    static_cast<float*>(out)[index] = value;
  else
    static_cast<uint16_t*>(out)[index] = kind == kFloat16 ? half_bits(value) : bfloat_bits(value);
}

// Both cells are read, whatever their weights, so a NaN shows wherever F.interpolate shows it.
FRAME_FN float between(float a, float b, float weight_a, float weight_b) {
  return fmaf(weight_b, b, weight_a * a);
}

}  // namespace
}  // namespace efficientad
