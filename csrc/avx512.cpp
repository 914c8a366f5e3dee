// Floor 0, includes avx.h and conv_*.h: the level of processors with AVX-512 (F, BW, DQ, VL); empty
// elsewhere.
#ifdef __x86_64__
#include "avx.h"
#include "conv_block.h"
#include "conv_gradient.h"

namespace efficientad {
namespace {

inline __m512 levels_at(const uint8_t* at, __mmask16 mask) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, at)));
}

void columns_avx512(const uint8_t* at, int64_t pitch, const float* weights, int32_t count,
                    int64_t n, float* out) {
  constexpr int kVectors = 8;
  int64_t i = 0;
  for (; i + 16 * kVectors <= n; i += 16 * kVectors) {
    __m512 sums[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = _mm512_setzero_ps();
    const uint8_t* row = at + i;
    for (int32_t k = 0; k < count; ++k, row += pitch) {
      const __m512 weight = _mm512_set1_ps(weights[k]);
      for (int v = 0; v < kVectors; ++v)
        sums[v] = _mm512_fmadd_ps(weight, levels_at(row + 16 * v, 0xffff), sums[v]);
    }
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(out + i + 16 * v, sums[v]);
  }
  for (; i < n; i += 16) {
    const __mmask16 mask = n - i < 16 ? static_cast<__mmask16>((1u << (n - i)) - 1) : 0xffff;
    __m512 sum = _mm512_setzero_ps();
    const uint8_t* row = at + i;
    for (int32_t k = 0; k < count; ++k, row += pitch)
      sum = _mm512_fmadd_ps(_mm512_set1_ps(weights[k]), levels_at(row, mask), sum);
    _mm512_mask_storeu_ps(out + i, mask, sum);
  }
}

struct Vector {
  using T = __m512;
  static constexpr int kWidth = 16, kRows = 14;
  static T load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, T value) { _mm512_storeu_ps(to, value); }
  static T broadcast(float value) { return _mm512_set1_ps(value); }
  static T fma(T a, T b, T sum) { return _mm512_fmadd_ps(a, b, sum); }
  // Of a NaN and a number the instruction returns its second operand.
  static T relu(T value) { return _mm512_max_ps(_mm512_setzero_ps(), value); }
};

}  // namespace

extern const Level kAvx512 = {
    "avx512",
    columns_avx512,
    pixels_avx,
    whole_loop,
    pack_avx,
    blend_loop,
    overlay_loop,
    convolve_share<Vector>,
    gradient_rows<Vector>,
    gradient_products<Vector>,
};

}  // namespace efficientad
#endif
