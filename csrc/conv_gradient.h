// Includes conv_parts.h: the filters' gradient of a strip of tiles, once per level.
#pragma once

#include "conv_parts.h"

namespace efficientad {
namespace {

// The rows of a strip's tiles from `first` to `end` for the filters' gradient: of x as for the
// convolution, and of y, which holds the outputs' gradient, through the transposed transform.
template <class V, int kSide>
void gradient_rows_of(const Convolution& k, const Strip& strip, int64_t first, int64_t end) {
  using T = typename V::T;
  const Grid g = grid_of(k);
  const int64_t piece = strip.tiles * kStride, point = g.pieces * piece;
  const int64_t panel = strip.tiles * kPanel, y_point = panels_of(k) * panel;
  for (int64_t t = first; t < end; ++t) {
    const Place at = place_of(k, g, strip.tile + t);
    transformed_rows<V, kSide>(k, at, strip.zeros, strip.rows + t * kStride, point, piece);
    for (int64_t c = 0; c < k.y.channels; c += V::kWidth) {
      T half[kSide * kOut];
#pragma GCC unroll 1
      for (int j = 0; j < kOut; ++j) {
        T from[kOut], to[kSide];
        const float* y = k.y.data + at.image * k.y.image + (at.column + j) * k.y.pixel + c;
        for (int i = 0; i < kOut; ++i) {
          const bool inside = at.row + i < g.height && at.column + j < g.width;
          from[i] = inside ? load_some<V>(y + (at.row + i) * k.y.row, k.y.channels - c)
                           : V::broadcast(0.0f);
        }
        transform<V, kSide, kOut, true>(k.output, from, to);
#pragma GCC unroll 8
        for (int i = 0; i < kSide; ++i) half[i * kOut + j] = to[i];
      }
      float* const out = strip.gradients + c / kPanel * panel + t * kPanel + c % kPanel;
#pragma GCC unroll 1
      for (int i = 0; i < kSide; ++i) {
        T to[kSide];
        transform<V, kSide, kOut, true>(k.output, half + i * kOut, to);
#pragma GCC unroll 8
        for (int j = 0; j < kSide; ++j) V::store(out + (i * kSide + j) * y_point, to[j]);
      }
    }
  }
}

template <class V>
void gradient_rows(const Convolution& k, const Strip& strip, int64_t first, int64_t end) {
  if (k.kernel == 3) return gradient_rows_of<V, 6>(k, strip, first, end);
  gradient_rows_of<V, 7>(k, strip, first, end);
}

// What a strip adds to the gradient of the transformed filters of a point, (channels, panels *
// kPanel); `first` strips overwrite it.
template <class V>
void gradient_products(const Convolution& k, const Strip& strip, int64_t p, float* products,
                       bool first) {
  const Grid g = grid_of(k);
  const int64_t panels = panels_of(k), row = panels * kPanel;
  for (int64_t panel = 0; panel < panels; ++panel)
    for (int64_t t = 0; t < strip.tiles; t += kSteps) {
      const int64_t left = strip.tiles - t, steps = left < kSteps ? left : kSteps;
      const float* gradients = strip.gradients + ((p * panels + panel) * strip.tiles + t) * kPanel;
      for (int64_t q = 0; q < g.pieces; ++q) {
        const float* rows = strip.rows + ((p * g.pieces + q) * strip.tiles + t) * kStride;
        const int64_t more = g.steps - q * kSteps, channels = more < kSteps ? more : kSteps;
        const int64_t groups = (channels + V::kRows - 1) / V::kRows;
        for (int64_t i = 0; i < groups; ++i) {
          const int64_t c = channels * i / groups, end = channels * (i + 1) / groups;
          multiply_panel<V, 1, kStride>(end - c, rows + c, gradients, steps,
                                        products + (q * kSteps + c) * row + panel * kPanel, row,
                                        first && t == 0);
        }
      }
    }
}

}  // namespace
}  // namespace efficientad
