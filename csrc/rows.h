// Includes level.h: row functions written as plain loops, compiled once per level.
//
// The portable level is these loops as they stand. The AVX levels take the ones that the compiler
// turns into vectors by itself and write the others out (avx.h).
#pragma once

#include "level.h"

namespace efficientad {
namespace {

void columns_loop(const uint8_t* at, int64_t pitch, const float* weights, int32_t count, int64_t n,
                  float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = column_sum(at + i, pitch, weights, count);
}

// Row by row: RGB floats, and three zeros behind them, which a pixel of four lanes reads, too.
template <void (*kColumns)(const uint8_t*, int64_t, const float*, int32_t, int64_t, float*)>
void spread_rows(const uint8_t* at, int64_t pitch, int32_t channels, int rows, int64_t n,
                 float* to) {
  const float one = 1.0f;
  for (int row = 0; row < rows; ++row, at += pitch, to += 3 * n + 3) {
    kColumns(at, pitch, &one, 1, n * channels, to);
    if (channels == 1)  // from the end, so that nothing is overwritten before it is read
      for (int64_t x = n - 1; x >= 0; --x) to[3 * x] = to[3 * x + 1] = to[3 * x + 2] = to[x];
    for (int c = 0; c < 3; ++c) to[3 * n + c] = 0.0f;
  }
}

void pixels_loop(const float* from, int64_t n, int64_t left, int rows, const Taps& taps,
                 uint8_t* to, int64_t pitch) {
  for (int row = 0; row < rows; ++row, from += 3 * n + 3, to += pitch) {
    for (int32_t i = 0; i < taps.size; ++i) {
      const float* at = from + 3 * (taps.spans[2 * i] - left);
      const float* weights = taps.weights + static_cast<int64_t>(i) * taps.width;
      for (int c = 0; c < 3; ++c)
        to[4 * i + c] =
            static_cast<uint8_t>(whole(row_sum(at + c, 3, weights, taps.spans[2 * i + 1])));
    }
  }
}

void pack_loop(const float* from, int64_t n, const Normal& normal, int32_t channels, int32_t kind,
               void* out) {
  for (int64_t i = 0; i < n; ++i) {
    for (int32_t c = 0; c < 3; ++c) {
      const float value = normalised(whole(from[4 * i + c]), normal.mean[c], normal.std[c]);
      store(out, i * channels + c, value, kind);
    }
    if (channels == 4) store(out, i * 4 + 3, 0.0f, kind);
  }
}

void blend_loop(const float* a, const float* b, float weight_a, float weight_b, int64_t n,
                float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = between(a[i], b[i], weight_a, weight_b);
}

}  // namespace
}  // namespace efficientad
