// Includes level.h: the host twin, split over threads.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "amx.h"
#include "level.h"

namespace efficientad {

std::vector<std::string> levels();          // that this processor has, best first
std::string level();                        // in use
void set_level(const std::string& name);    // "" is the best; throws std::invalid_argument

void resize_pack(const Frame& frame, const Taps& rows, const Taps& columns, const Normal& normal,
                 const Packed& out);

// Convolutions (conv.cpp), on at most `threads` threads. resize: bilinear without antialias, rows
// of x dense. mean_square: of every pixel's channels, all dense.
void convolve(const Convolution& convolution, int threads);
void filter_gradient(const Convolution& convolution, float* products, int threads);
void resize(const Pixels& x, const Pixels& y, int threads);
void mean_square(const float* x, int64_t pixels, int32_t channels, float* y, int threads);

// Convolutions of bfloat16 images (amx_host.cpp), where amx() says that there are any.
bool amx();               // compiled in, the processor has it, the system allows it, not switched off
void set_amx(bool wanted);  // throws std::runtime_error where there is none to switch on
// Where the steps of a convolution lie: of each of the kernel's rows, of each group of 32 channels,
// of each of its columns. Without groups: each row, of four pixels of 8 (amx_pack), twice.
std::vector<int64_t> amx_offsets(int64_t row, int64_t pixel, int32_t kernel, int32_t groups);
void amx_convolve(const AmxConvolution& convolution, int threads);
void amx_mean_square(const AmxConvolution& convolution, float* y, int threads);
void amx_pack(const Pixels& x, const Bfloats& y, int threads);
void amx_resize(const Bfloats& x, const Bfloats& y, int threads);

const Level& current();          // the level in use
float* scratch(int64_t floats);  // memory of this thread, 64-byte aligned, kept between calls

// Threads (pool.cpp). body(i) for every i < count, on the kept threads and the caller, together at
// most `limit` if it is not 0; where they are busy with another caller's work, on the caller alone.
// An exception of a body is rethrown.
void parallel(int64_t count, const std::function<void(int64_t)>& body, int limit = 0);
int threads();
void set_threads(int count);  // 0: as many as there are processors, at most 16

// Tables (taps.cpp): the number of weights an output cell needs, and the table itself.
int32_t taps_width(int32_t source, int32_t target, bool antialias);
void fill_taps(int32_t source, int32_t target, bool antialias, int32_t* spans, float* weights);

// Where the cells of a bilinear resize read, along one axis.
struct Axis {
  Axis(int32_t source, int32_t target)
      : width(taps_width(source, target, false)), spans(2 * target), weights(target * width) {
    fill_taps(source, target, false, spans.data(), weights.data());
  }

  struct Pair {
    int64_t a, b;
    float weight_a, weight_b;
  };
  Pair of(int64_t cell) const {
    const int64_t a = spans[2 * cell];
    const float* from = weights.data() + cell * width;
    if (spans[2 * cell + 1] == 1) return {a, a, from[0], 0.0f};
    return {a, a + 1, from[0], from[1]};
  }

  int64_t width;
  std::vector<int32_t> spans;
  std::vector<float> weights;
};

}  // namespace efficientad
