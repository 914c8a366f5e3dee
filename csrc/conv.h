// Includes the C library only: convolutions of channels-last float images on a CPU.
//
// A convolution is computed in tiles of 4x4 outputs. A tile gives, for each of a number of points,
// a row of `steps` numbers, which is multiplied with the point's filters:
//   minimal filtering (Winograd): (3 + kernel)^2 points, and a step is a channel. A row holds the
//     transformed (3 + kernel)^2 input pixels of the tile; its products are transformed back.
//   direct: 16 points, one for each output, with the same filters. A row is the output's patch,
//     (kernel, kernel, channels), and its products are the outputs.
// Everything between reading x and writing y stays in a thread's own scratch memory.
//
// A product is a chain of fused multiply-adds over 128 steps, then the sum of such pieces, whatever
// the number of threads, the place in a batch and the width of the vectors: the AVX levels give the
// same bits. The portable level rounds between multiplying and adding.
#pragma once

#include <stdint.h>
#include <string.h>

namespace efficientad {

constexpr int kOut = 4;                // output rows and columns of a tile
constexpr int kPanel = 32;             // output channels that are computed together
constexpr int kSteps = 128;            // steps of a piece: a panel's filters of them fit in L1
constexpr int kStride = kSteps + 16;   // floats between rows; no power of two, for the cache's sake
constexpr int kTiles = 28;             // tiles that share what is read of the filters

// (images, height, width, channels), channels side by side; strides in floats.
struct Pixels {
  float* data;
  int64_t image, row, pixel;
  int32_t images, height, width, channels;
};

struct Convolution {
  Pixels x, y;
  int32_t kernel, step, padding;  // step > 1 only if direct; padding with zeros on every side
  const float* filters;  // (panels, points, steps, kPanel), zero behind the last output channel;
                         // direct: (panels, steps, kPanel)
  const float* bias;     // (panels * kPanel)
  const float* input;    // transforms, (3 + kernel, 3 + kernel) and (4, 3 + kernel); both nullptr:
  const float* output;   // direct
  bool add;              // to what y holds; before ReLU and pooling, which `add` excludes
  bool relu;             // NaN stays NaN
  bool pool;             // 2x2 average with stride 2; `pool_padding` (0 or 1) zeros on every side
  int32_t pool_padding;
};

// A share of the work: some tiles, counted through rows, columns and images, of some panels.
struct Share {
  int64_t tile;
  int32_t tiles, panel, panel_end;
};

// Tiles whose rows lie side by side for the filters' gradient: of x (points, pieces, tiles,
// kStride), and of the outputs' gradient (points, panels, tiles, kPanel).
struct Strip {
  int64_t tile, tiles;
  const float* zeros;  // as many as x has channels, and a vector
  float *rows, *gradients;
};

namespace {  // internal linkage: a level compiled for AVX-512 must not be linked into another one

struct Grid {
  int32_t rows, columns;  // of tiles
  int32_t height, width;  // of outputs before pooling
  int32_t points, pieces;
  int64_t steps;
};

inline Grid grid_of(const Convolution& k) {
  Grid g;
  g.height = (k.x.height + 2 * k.padding - k.kernel) / k.step + 1;
  g.width = (k.x.width + 2 * k.padding - k.kernel) / k.step + 1;
  const int32_t scale = k.pool ? 2 : 1;  // a pooled output at 0 begins at -pool_padding
  g.rows = (scale * k.y.height + kOut - 1) / kOut;
  g.columns = (scale * k.y.width + kOut - 1) / kOut;
  const int32_t side = kOut - 1 + k.kernel;
  g.points = k.input ? side * side : kOut * kOut;
  g.steps = k.input ? k.x.channels : static_cast<int64_t>(k.kernel) * k.kernel * k.x.channels;
  g.pieces = static_cast<int32_t>((g.steps + kSteps - 1) / kSteps);
  return g;
}

inline int64_t panels_of(const Convolution& k) { return (k.y.channels + kPanel - 1) / kPanel; }

// Floats of scratch memory: zeros, rows (point, piece, tile, kStride), products (point, tile,
// kPanel). All of it on 64-byte boundaries if its start is.
inline int64_t zeros_of(const Convolution& k) { return (k.x.channels + 31) / 16 * 16; }
inline int64_t scratch_of(const Convolution& k, const Grid& g, int32_t tiles) {
  return zeros_of(k) + static_cast<int64_t>(g.points) * tiles * (g.pieces * kStride + kPanel);
}

}  // namespace
}  // namespace efficientad
