// Includes avx.h and conv_*.h: the level of processors with AVX2, FMA and F16C; empty
// elsewhere.
#ifdef __x86_64__
#include "avx.h"
#include "conv_block.h"
#include "conv_gradient.h"

namespace efficientad {
namespace {

inline __m256 levels_at(const uint8_t* at) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}

void columns_avx2(const uint8_t* at, int64_t pitch, const float* weights, int32_t count, int64_t n,
                  float* out) {
  constexpr int kVectors = 8;  // sums in registers: enough to hide the latency of the fused add
  int64_t i = 0;
  for (; i + 8 * kVectors <= n; i += 8 * kVectors) {
    __m256 sums[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = _mm256_setzero_ps();
    const uint8_t* row = at + i;
    for (int32_t k = 0; k < count; ++k, row += pitch) {
      const __m256 weight = _mm256_broadcast_ss(weights + k);
      for (int v = 0; v < kVectors; ++v)
        sums[v] = _mm256_fmadd_ps(weight, levels_at(row + 8 * v), sums[v]);
    }
    for (int v = 0; v < kVectors; ++v) _mm256_storeu_ps(out + i + 8 * v, sums[v]);
  }
  for (; i + 8 <= n; i += 8) {
    __m256 sum = _mm256_setzero_ps();
    const uint8_t* row = at + i;
    for (int32_t k = 0; k < count; ++k, row += pitch)
      sum = _mm256_fmadd_ps(_mm256_broadcast_ss(weights + k), levels_at(row), sum);
    _mm256_storeu_ps(out + i, sum);
  }
  columns_loop(at + i, pitch, weights, count, n - i, out + i);
}

struct Vector {
  using T = __m256;
  static constexpr int kWidth = 8, kRows = 6;
  static T load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, T value) { _mm256_storeu_ps(to, value); }
  static T broadcast(float value) { return _mm256_set1_ps(value); }
  static T fma(T a, T b, T sum) { return _mm256_fmadd_ps(a, b, sum); }
  // Of a NaN and a number the instruction returns its second operand.
  static T relu(T value) { return _mm256_max_ps(_mm256_setzero_ps(), value); }
};

}  // namespace

extern const Level kAvx2 = {
    "avx2",
    columns_avx2,
    spread_rows<columns_avx2>,
    pixels_avx,
    pack_avx,
    blend_loop,
    convolve_share<Vector>,
    gradient_rows<Vector>,
    gradient_products<Vector>,
};

}  // namespace efficientad
#endif
