// Includes conv_parts.h: a share of a convolution, compiled once per level.
#pragma once

#include "conv_parts.h"

namespace efficientad {
namespace {

// Writes `count` floats from step `at` of a row on; from nullptr zeros.
inline void put(float* row, int64_t piece, int64_t at, const float* from, int64_t count) {
  while (count > 0) {
    const int64_t room = kSteps - at % kSteps, size = count < room ? count : room;
    float* const to = row + at / kSteps * piece + at % kSteps;
    if (from) {
      memcpy(to, from, size * sizeof(float));
      from += size;
    } else {
      memset(to, 0, size * sizeof(float));
    }
    at += size;
    count -= size;
  }
}

// Rows of one tile for a direct convolution: the patches of its 4x4 outputs.
inline void patch_rows(const Convolution& k, const Place& at, float* rows, int64_t point,
                       int64_t piece) {
  const int64_t channels = k.x.channels;
  const bool dense = k.x.pixel == channels;  // a filter's row of pixels is one run of floats
  for (int o = 0; o < kOut * kOut; ++o, rows += point) {
    const int32_t top = (at.row + o / kOut) * k.step - k.padding;
    const int32_t left = (at.column + o % kOut) * k.step - k.padding;
    const bool inside = left >= 0 && left + k.kernel <= k.x.width;
    int64_t step = 0;
    for (int32_t i = 0; i < k.kernel; ++i) {
      if (dense && inside) {
        put(rows, piece, step, pixel_of(k, at.image, top + i, left), k.kernel * channels);
        step += k.kernel * channels;
        continue;
      }
      for (int32_t j = 0; j < k.kernel; ++j, step += channels)
        put(rows, piece, step, pixel_of(k, at.image, top + i, left + j), channels);
    }
  }
}

// Bias, what y holds, ReLU and pooling of one tile's outputs, for the channels from `channel` on.
// kWhole: the tile lies inside the image, and all channels of the vector are wanted.
template <class V, bool kWhole>
inline void finish(const Convolution& k, const Grid& g, const Place& at, int64_t channel,
                   typename V::T* outputs) {
  using T = typename V::T;
  const int64_t count = kWhole ? V::kWidth : k.y.channels - channel;
  const T bias = V::load(k.bias + channel), zero = V::broadcast(0.0f);
  float* const y = k.y.data + at.image * k.y.image + channel;
  const auto inside = [&](int i, int j) {
    const int32_t row = at.row + i, column = at.column + j;
    return kWhole || (row >= 0 && row < g.height && column >= 0 && column < g.width);
  };
  const auto place = [&](int64_t row, int64_t column) {
    return y + row * k.y.row + column * k.y.pixel;
  };
  if (!k.pool) {
#pragma GCC unroll 16
    for (int o = 0; o < kOut * kOut; ++o) {
      if (!inside(o / kOut, o % kOut)) continue;
      float* const to = place(at.row + o / kOut, at.column + o % kOut);
      T value = outputs[o] + bias;
      if (k.add) value = value + load_some<V>(to, count);
      store_some<V>(to, k.relu ? V::relu(value) : value, count);
    }
    return;
  }
#pragma GCC unroll 4
  for (int o = 0; o < kOut; ++o) {
    const int i = o / 2 * 2, j = o % 2 * 2;
    const int32_t row = (at.row + k.pool_padding + i) / 2;
    const int32_t column = (at.column + k.pool_padding + j) / 2;
    if (!kWhole && (row >= k.y.height || column >= k.y.width)) continue;
    T sum = zero;
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const int a = i + c / 2, b = j + c % 2;
      const T value = outputs[a * kOut + b] + bias;
      sum = sum + (inside(a, b) ? (k.relu ? V::relu(value) : value) : zero);
    }
    store_some<V>(place(row, column), sum * V::broadcast(0.25f), count);
  }
}

// Products of one tile and a panel -> outputs. Products of a point are `point` floats apart.
template <class V, int kSide>
void outputs_of(const Convolution& k, const Grid& g, const Place& at, int64_t panel,
                const float* products, int64_t point) {
  using T = typename V::T;
  const bool inside = at.row >= 0 && at.row + kOut <= g.height && at.column >= 0 &&
                      at.column + kOut <= g.width;
  for (int64_t c = 0; c < kPanel && panel * kPanel + c < k.y.channels; c += V::kWidth) {
    T outputs[kOut * kOut];
    if constexpr (kSide == 0) {
      for (int o = 0; o < kOut * kOut; ++o) outputs[o] = V::load(products + o * point + c);
    } else {
      T half[kOut * kSide];
#pragma GCC unroll 1
      for (int j = 0; j < kSide; ++j) {
        T from[kSide], to[kOut];
#pragma GCC unroll 8
        for (int i = 0; i < kSide; ++i) from[i] = V::load(products + (i * kSide + j) * point + c);
        transform<V, kOut, kSide>(k.output, from, to);
#pragma GCC unroll 8
        for (int i = 0; i < kOut; ++i) half[i * kSide + j] = to[i];
      }
#pragma GCC unroll 1
      for (int i = 0; i < kOut; ++i)
        transform<V, kOut, kSide>(k.output, half + i * kSide, outputs + i * kOut);
    }
    const int64_t channel = panel * kPanel + c;
    if (inside && channel + V::kWidth <= k.y.channels)
      finish<V, true>(k, g, at, channel, outputs);
    else
      finish<V, false>(k, g, at, channel, outputs);
  }
}

// kSide: input rows and columns of a tile, or 0 for a direct convolution.
template <class V, int kSide>
void share_of(const Convolution& k, const Share& share, float* scratch) {
  const Grid g = grid_of(k);
  const int64_t tiles = share.tiles, piece = tiles * kStride, point = g.pieces * piece;
  float* const zeros = scratch;
  float* const rows = zeros + zeros_of(k);
  float* const products = rows + g.points * point;
  memset(zeros, 0, zeros_of(k) * sizeof(float));
  for (int64_t t = 0; t < tiles; ++t) {
    const Place at = place_of(k, g, share.tile + t);
    if constexpr (kSide == 0)
      patch_rows(k, at, rows + t * kStride, point, piece);
    else
      transformed_rows<V, kSide>(k, at, zeros, rows + t * kStride, point, piece);
  }
  const int64_t groups = (tiles + V::kRows - 1) / V::kRows;
  for (int64_t panel = share.panel; panel < share.panel_end; ++panel) {
    for (int64_t p = 0; p < g.points; ++p) {
      const int64_t set = kSide == 0 ? panel : panel * g.points + p;
      const float* filters = k.filters + set * g.steps * kPanel;
      for (int64_t q = 0; q < g.pieces; ++q, filters += kSteps * kPanel) {
        const int64_t left = g.steps - q * kSteps, steps = left < kSteps ? left : kSteps;
        for (int64_t i = 0; i < groups; ++i) {
          const int64_t first = tiles * i / groups, end = tiles * (i + 1) / groups;
          multiply_panel<V, kStride, 1>(end - first, rows + p * point + q * piece + first * kStride,
                                        filters, steps, products + (p * tiles + first) * kPanel,
                                        kPanel, q == 0);
        }
      }
    }
    for (int64_t t = 0; t < tiles; ++t)
      outputs_of<V, kSide>(k, g, place_of(k, g, share.tile + t), panel, products + t * kPanel,
                           tiles * kPanel);
  }
}

template <class V>
void convolve_share(const Convolution& k, const Share& share, float* scratch) {
  if (k.input == nullptr) return share_of<V, 0>(k, share, scratch);
  if (k.kernel == 3) return share_of<V, 6>(k, share, scratch);
  share_of<V, 7>(k, share, scratch);
}

}  // namespace
}  // namespace efficientad
