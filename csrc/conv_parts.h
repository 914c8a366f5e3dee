// Includes conv.h: what convolutions and their gradients share, compiled once per level.
//
// V is a level's vector: T (its type), kWidth (floats), kRows (rows of a product that stay in
// registers beside two vectors of filters), and the functions load, store, broadcast, fma, relu.
#pragma once

#include "conv.h"

namespace efficientad {
namespace {

// kRows rows times two vectors of filters: products[row] (+)= sum over steps of value * filters.
// Values of successive rows lie kRow floats apart, of successive steps kStep.
template <class V, int kRows, int kRow, int kStep>
inline __attribute__((always_inline)) void multiply(const float* rows, const float* filters,
                                                    int64_t steps, float* products, int64_t row,
                                                    bool first) {
  using T = typename V::T;
  T sums[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = V::broadcast(0.0f);
  for (int64_t s = 0; s < steps; ++s, rows += kStep, filters += kPanel) {
    // The filters lie in memory in the order of their use, but come from far.
    __builtin_prefetch(filters + kSteps * kPanel, 0, 2);
    if constexpr (V::kWidth == 16) __builtin_prefetch(filters + kSteps * kPanel + 16, 0, 2);
    const T a = V::load(filters), b = V::load(filters + V::kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const T value = V::broadcast(rows[r * kRow]);
      sums[r][0] = V::fma(value, a, sums[r][0]);
      sums[r][1] = V::fma(value, b, sums[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < 2; ++v) {
      float* const product = products + r * row + v * V::kWidth;
      V::store(product, first ? sums[r][v] : sums[r][v] + V::load(product));
    }
}

// The same for any number of rows up to kRows, over the whole panel.
template <class V, int kRow, int kStep, int kRows = V::kRows>
void multiply_panel(int64_t count, const float* rows, const float* filters, int64_t steps,
                    float* products, int64_t row, bool first) {
  if (count == kRows) {
    for (int v = 0; v < kPanel; v += 2 * V::kWidth)
      multiply<V, kRows, kRow, kStep>(rows, filters + v, steps, products + v, row, first);
    return;
  }
  if constexpr (kRows > 1)
    multiply_panel<V, kRow, kStep, kRows - 1>(count, rows, filters, steps, products, row, first);
}

// Of a run of channels or outputs that ends within a vector, only `count` values are touched.
template <class V>
inline typename V::T load_some(const float* from, int64_t count) {
  if (count >= V::kWidth) return V::load(from);
  float values[V::kWidth] = {};
  memcpy(values, from, count * sizeof(float));
  return V::load(values);
}

template <class V>
inline void store_some(float* to, typename V::T value, int64_t count) {
  if (count >= V::kWidth) return V::store(to, value);
  float values[V::kWidth];
  V::store(values, value);
  memcpy(to, values, count * sizeof(float));
}

// to = matrix times from, vectors: matrix (kTo, kFrom), or transposed (kFrom, kTo).
template <class V, int kTo, int kFrom, bool kTransposed = false>
inline __attribute__((always_inline)) void transform(const float* matrix, const typename V::T* from,
                                                     typename V::T* to) {
#pragma GCC unroll 8
  for (int i = 0; i < kTo; ++i) {
    to[i] = V::broadcast(0.0f);
#pragma GCC unroll 8
    for (int j = 0; j < kFrom; ++j) {
      const float value = kTransposed ? matrix[j * kTo + i] : matrix[i * kFrom + j];
      to[i] = V::fma(V::broadcast(value), from[j], to[i]);
    }
  }
}

struct Place {
  int64_t image;
  int32_t row, column;  // of the tile's first output before pooling
};

inline Place place_of(const Convolution& k, const Grid& g, int64_t tile) {
  const int64_t line = tile / g.columns;
  const int32_t before = k.pool ? k.pool_padding : 0;
  return {line / g.rows, static_cast<int32_t>(line % g.rows) * kOut - before,
          static_cast<int32_t>(tile % g.columns) * kOut - before};
}

// The pixel of an image, or nullptr in the padding.
inline const float* pixel_of(const Convolution& k, int64_t image, int32_t row, int32_t column) {
  if (row < 0 || row >= k.x.height || column < 0 || column >= k.x.width) return nullptr;
  return k.x.data + image * k.x.image + row * k.x.row + column * k.x.pixel;
}

// Rows of one tile for minimal filtering. Rows of a point are `point` floats apart, pieces of a
// row `piece` floats.
template <class V, int kSide>
void transformed_rows(const Convolution& k, const Place& at, const float* zeros, float* rows,
                      int64_t point, int64_t piece) {
  using T = typename V::T;
  const float* cells[kSide * kSide];
  for (int i = 0; i < kSide; ++i)
    for (int j = 0; j < kSide; ++j) {
      const float* cell = pixel_of(k, at.image, at.row + i - k.padding, at.column + j - k.padding);
      cells[i * kSide + j] = cell ? cell : zeros;
    }
  for (int64_t c = 0; c < k.x.channels; c += V::kWidth) {
    T half[kSide * kSide];
#pragma GCC unroll 1
    for (int j = 0; j < kSide; ++j) {
      T from[kSide], to[kSide];
#pragma GCC unroll 8
      for (int i = 0; i < kSide; ++i)
        from[i] = load_some<V>(cells[i * kSide + j] + c, k.x.channels - c);
      transform<V, kSide, kSide>(k.input, from, to);
#pragma GCC unroll 8
      for (int i = 0; i < kSide; ++i) half[i * kSide + j] = to[i];
    }
    float* const out = rows + c / kSteps * piece + c % kSteps;
#pragma GCC unroll 1
    for (int i = 0; i < kSide; ++i) {
      T to[kSide];
      transform<V, kSide, kSide>(k.input, half + i * kSide, to);
#pragma GCC unroll 8
      for (int j = 0; j < kSide; ++j) V::store(out + (i * kSide + j) * point, to[j]);
    }
  }
}

}  // namespace
}  // namespace efficientad
