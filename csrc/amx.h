// Includes conv.h: convolutions of channels-last bfloat16 images in the tiles of AMX.
//
// A tile of 16 outputs' rows and one of 16 output channels are multiplied 32 steps at a time and
// summed in float32. A step is 32 bfloat16 that lie side by side in an image, so that images are
// read where they are: a tile's row is an output's place, whose input lies one `pixel` further on.
// The products of a share stay in the thread's scratch memory until they are biased, pooled and
// rounded, or squared and summed without being rounded.
#pragma once

#include "conv.h"

namespace efficientad {

constexpr int kTileRows = 16;  // outputs of a tile
constexpr int kTileSteps = 32;  // bfloat16 of a step

// As Pixels, bfloat16; strides in bfloat16.
struct Bfloats {
  uint16_t* data;
  int64_t image, row, pixel;
  int32_t images, height, width, channels;
};

// What a convolution reads: an image and the filters of it. Strides in bfloat16 between the inputs
// of neighbouring outputs, and from an output's first input to its steps.
struct AmxInput {
  const uint16_t* data;
  int64_t image, row, pixel;
  const int64_t* offsets;
  int32_t steps;
  const uint16_t* filters;  // (panels, steps, 2, 16, 16, 2): pairs of steps of 16 channels, twice
};

// The sum over one or two inputs.
struct AmxConvolution {
  AmxInput inputs[2];
  int32_t count;
  int32_t height, width;          // of outputs before pooling
  const float* bias;              // (panels * kPanel), zero behind the last channel
  bool relu, pool;                // as in Convolution
  int32_t pool_padding;
  Bfloats y;       // without data its sizes count, and `squares` is written
  float* squares;  // (panels, images, height, width): sums of a panel's squares
};

// Some rows of y of one image, and some panels.
struct AmxShare {
  int64_t image;
  int32_t row, row_end, panel, panel_end;
};



// Two inputs of a bilinear resize along one axis, in bfloat16 from the row's start, and their weights.
struct AmxPair {
  int64_t a, b;
  float weight_a, weight_b;
};

struct AmxLevel {
  // scratch: 64-byte aligned, amx_scratch() floats.
  void (*convolve)(const AmxConvolution& convolution, const AmxShare& share, float* scratch);
  // n pixels of 3 floats -> 8 bfloat16 each: their rounded values, 0, what is missing, 0.
  void (*pack)(const float* from, int64_t n, uint16_t* to);
  // A row of outputs, `pixel` apart, of a bilinear resize: two rows of inputs, and where outputs
  // read in them.
  void (*resize)(const uint16_t* above, const uint16_t* below, float weight_above,
                 float weight_below, const AmxPair* columns, int64_t n, int64_t channels,
                 int64_t pixel, uint16_t* to);
};

const AmxLevel* amx_level();  // nullptr: not compiled in

namespace {

// How the outputs of some rows are laid into tiles: as one line that runs over the ends of the
// rows, where that wastes less, or as a line for each row. The last tile of a line begins early
// enough to end with it, so nothing behind it is read.
struct AmxTiling {
  int32_t lines, tiles;   // tiles of a line
  int64_t length, pitch;  // outputs of a line; from one row to the next if it is one line
  bool flat;
};

inline AmxTiling amx_tiling(const AmxConvolution& k, int32_t rows, int32_t width) {
  const AmxInput& x = k.inputs[0];
  const int64_t pitch = x.row / x.pixel;
  bool flat = x.row % x.pixel == 0;
  if (k.count == 2) flat = flat && k.inputs[1].row == pitch * k.inputs[1].pixel;
  const int64_t length = (rows - 1) * pitch + width;
  const auto tiles = [](int64_t n) { return (n + kTileRows - 1) / kTileRows; };
  flat = flat && tiles(length) <= rows * tiles(width);
  if (flat) return {1, static_cast<int32_t>(tiles(length)), length, pitch, true};
  return {rows, static_cast<int32_t>(tiles(width)), width, 0, false};
}

// Rows and columns of outputs before pooling that a share needs.
struct AmxWindow {
  int32_t row, rows, width;
};

inline AmxWindow amx_window(const AmxConvolution& k, const AmxShare& share) {
  if (!k.pool) return {share.row, share.row_end - share.row, k.width};
  const int32_t first = 2 * share.row - k.pool_padding, end = 2 * share.row_end - k.pool_padding;
  const int32_t top = first < 0 ? 0 : first, bottom = end < k.height ? end : k.height;
  // A last odd column is in no pooled output.
  return {top, bottom - top, k.pool_padding ? k.width : k.width / 2 * 2};
}

// Floats of scratch memory: where tiles begin, two for an address, and products (tile, row, kPanel).
inline int64_t amx_starts(const AmxTiling& t) {
  return (2 * 2 * static_cast<int64_t>(t.lines) * t.tiles + 15) / 16 * 16;
}
inline int64_t amx_scratch(const AmxTiling& t) {
  return amx_starts(t) + static_cast<int64_t>(t.lines) * t.tiles * kTileRows * kPanel;
}

}  // namespace
}  // namespace efficientad
