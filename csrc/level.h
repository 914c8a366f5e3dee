// Includes frame.h and conv.h: what each level of vector instructions supplies.
//
// No C++ library here: what an AVX source instantiates of it could be linked into other code.
#pragma once

#include "conv.h"
#include "frame.h"

namespace efficientad {

constexpr int kRows = 8;  // rows that are resized together: enough sums to hide an addition's time

// The functions of one instruction set. All levels give the same bits of a frame.
struct Level {
  const char* name;
  // out[i] = column_sum(at + i, ...) for i < n.
  void (*columns)(const uint8_t* at, int64_t pitch, const float* weights, int32_t count, int64_t n,
                  float* out);
  // Floats of n pixels of `rows` rows that lie `pitch` bytes apart, as pixels() reads them: at most
  // 4 * kRows * (n + 3) of them.
  void (*spread)(const uint8_t* at, int64_t pitch, int32_t channels, int rows, int64_t n, float* to);
  // RGBX levels of `rows` resized rows, `pitch` bytes apart, from n pixels by spread(), of which the
  // first is the source's pixel `left`. The fourth level is undefined.
  void (*pixels)(const float* from, int64_t n, int64_t left, int rows, const Taps& taps,
                 uint8_t* to, int64_t pitch);
  // Normalises the whole levels of n RGBX sums and stores 3 or 4 channels of them.
  void (*pack)(const float* from, int64_t n, const Normal& normal, int32_t channels, int32_t kind,
               void* out);
  // out[i] = between(a[i], b[i], weight_a, weight_b) for i < n.
  void (*blend)(const float* a, const float* b, float weight_a, float weight_b, int64_t n,
                float* out);
  // One share of a convolution; scratch: 64-byte aligned, scratch_of() floats.
  void (*convolve)(const Convolution& convolution, const Share& share, float* scratch);
  // The gradient of the filters of minimal filtering; y holds the outputs' gradient.
  void (*gradient_rows)(const Convolution& convolution, const Strip& strip, int64_t first,
                        int64_t end);
  void (*gradient_products)(const Convolution& convolution, const Strip& strip, int64_t point,
                            float* products, bool first);
};

extern const Level kPortable;
#ifdef __x86_64__
extern const Level kAvx2, kAvx512;
#endif

}  // namespace efficientad
