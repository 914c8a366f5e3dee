// Floor 0, includes level.h: the host twin, split over threads.
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
void upsample(const Maps& maps, const Taps& rows, const Taps& columns, float* out);
void overlay(const Frame& frame, const float* values, const Colors& colors, uint8_t* out);

// Threads (pool.cpp). body(i) for every i < count, on the kept threads and the caller; where they
// are busy with another caller's work, on the caller alone. An exception of a body is rethrown.
void parallel(int64_t count, const std::function<void(int64_t)>& body);
int threads();
void set_threads(int count);  // 0: as many as there are processors, at most 16

// Tables (taps.cpp): the number of weights an output cell needs, and the table itself.
int32_t taps_width(int32_t source, int32_t target, bool antialias);
void fill_taps(int32_t source, int32_t target, bool antialias, int32_t* spans, float* weights);

}  // namespace efficientad
