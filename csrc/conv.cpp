// Includes host.h: convolutions and what stands between them, split for the threads.
#include <algorithm>

#include "host.h"

namespace efficientad {
namespace {

// Multiplications; less is done before a thread has woken up.
constexpr int64_t kSmall = 1 << 20;

}  // namespace

void convolve(const Convolution& k, int threads) {
  const Level& level = current();
  const Grid g = grid_of(k);
  const int64_t panels = panels_of(k);
  const int64_t tiles = static_cast<int64_t>(k.x.images) * g.rows * g.columns;
  if (tiles == 0 || panels == 0) return;
  const int64_t workers = std::max(1, threads);
  // As many shares as there are workers, or a multiple of it. Where there are few tiles they are
  // transformed once more for each part of the panels: cheaper than to read all filters again.
  int64_t blocks = (tiles + kTiles - 1) / kTiles, parts = 1;
  if (blocks >= workers)
    blocks = std::min(tiles, (blocks + workers - 1) / workers * workers);
  else
    parts = std::min(panels, (workers + blocks - 1) / blocks);
  const auto share = [&](int64_t i) {
    const int64_t block = i / parts, part = i % parts;
    const int64_t tile = tiles * block / blocks, end = tiles * (block + 1) / blocks;
    const Share mine{tile, static_cast<int32_t>(end - tile),
                     static_cast<int32_t>(panels * part / parts),
                     static_cast<int32_t>(panels * (part + 1) / parts)};
    level.convolve(k, mine, scratch(scratch_of(k, g, mine.tiles)));
  };
  const bool small = tiles * g.points * g.steps * panels * kPanel < kSmall;
  parallel(blocks * parts, share, small ? 1 : threads);
}

void filter_gradient(const Convolution& k, float* products, int threads) {
  constexpr int64_t kStrip = 2 << 20;  // floats of a strip, about; a share of the last cache
  constexpr int64_t kBlock = 8;        // tiles
  const Level& level = current();
  const Grid g = grid_of(k);
  const int64_t panels = panels_of(k);
  const int64_t tiles = static_cast<int64_t>(k.x.images) * g.rows * g.columns;
  const int64_t tile = g.points * (g.pieces * kStride + panels * kPanel);  // floats
  if (tiles == 0) {
    memset(products, 0, g.points * k.x.channels * panels * kPanel * sizeof(float));
    return;
  }
  const int64_t strips = std::min(tiles, (tiles * tile + kStrip - 1) / kStrip);
  const int64_t most = (tiles + strips - 1) / strips, zeros = zeros_of(k);
  float* const memory = scratch(zeros + most * tile);
  memset(memory, 0, zeros * sizeof(float));
  for (int64_t i = 0; i < strips; ++i) {
    const int64_t first = tiles * i / strips, count = tiles * (i + 1) / strips - first;
    float* const rows = memory + zeros;
    const Strip strip{first, count, memory, rows, rows + g.points * g.pieces * count * kStride};
    parallel(
        (count + kBlock - 1) / kBlock,
        [&](int64_t block) {
          level.gradient_rows(k, strip, block * kBlock, std::min(count, (block + 1) * kBlock));
        },
        threads);
    parallel(
        g.points,
        [&](int64_t p) {
          float* const to = products + p * k.x.channels * panels * kPanel;
          level.gradient_products(k, strip, p, to, i == 0);
        },
        threads);
  }
}

void resize(const Pixels& x, const Pixels& y, int threads) {
  const Level& level = current();
  const Axis rows(x.height, y.height), columns(x.width, y.width);
  const int64_t line = static_cast<int64_t>(x.width) * x.channels;
  parallel(
      static_cast<int64_t>(y.images) * y.height,
      [&](int64_t i) {
        float* const wide = scratch(line);  // an output row as wide as the input
        const int64_t image = i / y.height, row = i % y.height;
        const float* from = x.data + image * x.image;
        const Axis::Pair up = rows.of(row);
        level.blend(from + up.a * x.row, from + up.b * x.row, up.weight_a, up.weight_b, line, wide);
        float* to = y.data + image * y.image + row * y.row;
        for (int64_t column = 0; column < y.width; ++column, to += y.pixel) {
          const Axis::Pair side = columns.of(column);
          level.blend(wide + side.a * x.channels, wide + side.b * x.channels, side.weight_a,
                      side.weight_b, x.channels, to);
        }
      },
      line * y.height < kSmall / 8 ? 1 : threads);
}

void mean_square(const float* x, int64_t count, int32_t channels, float* y, int threads) {
  constexpr int64_t kRun = 64;
  parallel(
      (count + kRun - 1) / kRun,
      [&](int64_t run) {
        const int64_t end = std::min(count, (run + 1) * kRun);
        for (int64_t i = run * kRun; i < end; ++i) {
          const float* from = x + i * channels;
          float sums[16] = {};  // independent, so that they are vectors
          int32_t c = 0;
          for (; c + 16 <= channels; c += 16)
            for (int j = 0; j < 16; ++j) sums[j] += from[c + j] * from[c + j];
          for (; c < channels; ++c) sums[0] += from[c] * from[c];
          float sum = 0.0f;
          for (float part : sums) sum += part;
          y[i] = sum / static_cast<float>(channels);
        }
      },
      count * channels < kSmall / 8 ? 1 : threads);
}

}  // namespace efficientad
