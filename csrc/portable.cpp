// Includes rows.h and conv_*.h: the level of every processor.
#include "conv_block.h"
#include "conv_gradient.h"
#include "rows.h"

namespace efficientad {
namespace {

// Four floats, in whatever registers the compiler finds for them.
struct Vector {
  using T = float __attribute__((vector_size(16)));
  static constexpr int kWidth = 4, kRows = 4;
  static T load(const float* from) {
    T value;
    memcpy(&value, from, sizeof value);
    return value;
  }
  static void store(float* to, T value) { memcpy(to, &value, sizeof value); }
  static T broadcast(float value) { return T{value, value, value, value}; }
  static T fma(T a, T b, T sum) { return a * b + sum; }
  static T relu(T value) { return value < T{} ? T{} : value; }
};

}  // namespace

extern const Level kPortable = {
    "portable",
    columns_loop,
    spread_rows<columns_loop>,
    pixels_loop,
    pack_loop,
    blend_loop,
    convolve_share<Vector>,
    gradient_rows<Vector>,
    gradient_products<Vector>,
};

}  // namespace efficientad
