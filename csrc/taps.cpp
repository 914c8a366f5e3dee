// Includes host.h: where an output cell reads and with which weights.
#include <math.h>

#include <algorithm>

#include "host.h"

namespace efficientad {
namespace {

constexpr double kOne = 1 << 22;  // Pillow's weights are integers, with 22 bits behind the point

double centre(int32_t source, int32_t target, int32_t i) {
  return (i + 0.5) * source / target;  // of output cell i, in source cells
}

// The triangle filter, as wide as an output cell where the image shrinks: its source cells.
void reach(int32_t source, int32_t target, int32_t i, int32_t* first, int32_t* end) {
  const double middle = centre(source, target, i);
  const double support = std::max(static_cast<double>(source) / target, 1.0);
  // A cell belongs to it if its own centre lies inside.
  *first = std::max(0, static_cast<int32_t>(ceil(middle - support - 0.5)));
  *end = std::min(source, static_cast<int32_t>(floor(middle + support - 0.5)) + 1);
}

}  // namespace

int32_t taps_width(int32_t source, int32_t target, bool antialias) {
  if (!antialias) return std::min(source, 2);
  const double support = std::max(static_cast<double>(source) / target, 1.0);
  return std::min(source, static_cast<int32_t>(ceil(2 * support)) + 1);
}

void fill_taps(int32_t source, int32_t target, bool antialias, int32_t* spans, float* weights) {
  const int32_t width = taps_width(source, target, antialias);
  const double support =
      antialias ? std::max(static_cast<double>(source) / target, 1.0) : 1.0;
  for (int32_t i = 0; i < target; ++i, weights += width) {
    std::fill(weights, weights + width, 0.0f);
    if (!antialias) {  // two neighbours; the centre of a border cell reaches beyond the image
      const double at = std::max(centre(source, target, i) - 0.5, 0.0);
      const int32_t first = std::min(static_cast<int32_t>(at), source - 1);
      const bool two = first + 1 < source;
      spans[2 * i] = first;
      spans[2 * i + 1] = two ? 2 : 1;
      const double part = two ? at - first : 0.0;
      weights[0] = static_cast<float>(1.0 - part);
      if (two) weights[1] = static_cast<float>(part);
      continue;
    }
    int32_t first, end;
    reach(source, target, i, &first, &end);
    const double middle = centre(source, target, i);
    const auto weight = [&](int32_t cell) {
      return std::max(0.0, 1.0 - fabs(cell + 0.5 - middle) / support);
    };
    while (first < end - 1 && weight(first) == 0.0) ++first;  // cells without weight are not read
    while (end - 1 > first && weight(end - 1) == 0.0) --end;
    double total = 0.0;
    for (int32_t cell = first; cell < end; ++cell) total += weight(cell);
    for (int32_t cell = first; cell < end; ++cell)
      weights[cell - first] = static_cast<float>(floor(weight(cell) / total * kOne + 0.5) / kOne);
    spans[2 * i] = first;
    spans[2 * i + 1] = end - first;
  }
}

}  // namespace efficientad
