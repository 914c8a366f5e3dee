// Includes level.h: the host twin, split over threads.
#pragma once

#include <functional>
#include <string>
#include <vector>

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

}  // namespace efficientad
