// Includes rows.h: row functions that need AVX2, FMA and F16C written out, for both AVX
// levels. The lanes do what the loops of rows.h do, in the same order.
#pragma once

#include <immintrin.h>

#include "rows.h"

namespace efficientad {
namespace {

// A pixel lives in four lanes; the fourth holds its right neighbour's red and is never used.
// `rows` rows share each weight that is loaded.
template <int kCount>
void pixels_of(const float* from, int64_t n, int64_t left, const Taps& taps, uint8_t* to,
               int64_t pitch) {
  const __m128 half = _mm_set1_ps(0.5f);
  for (int32_t i = 0; i < taps.size; ++i) {
    const float* at = from + 3 * (taps.spans[2 * i] - left);
    const float* weights = taps.weights + static_cast<int64_t>(i) * taps.width;
    const int32_t count = taps.spans[2 * i + 1];
    __m128 sums[kCount];
    for (int row = 0; row < kCount; ++row) sums[row] = _mm_setzero_ps();
    for (int32_t k = 0; k < count; ++k, at += 3) {
      const __m128 weight = _mm_broadcast_ss(weights + k);
      for (int row = 0; row < kCount; ++row)
        sums[row] = _mm_fmadd_ps(weight, _mm_loadu_ps(at + row * (3 * n + 3)), sums[row]);
    }
    for (int row = 0; row < kCount; ++row) {
      const __m128i level = _mm_cvttps_epi32(_mm_add_ps(sums[row], half));
      const __m128i words = _mm_packus_epi32(level, level);
      const int32_t bytes = _mm_cvtsi128_si32(_mm_packus_epi16(words, words));
      memcpy(to + row * pitch + 4 * i, &bytes, 4);
    }
  }
}

void pixels_avx(const float* from, int64_t n, int64_t left, int rows, const Taps& taps,
                uint8_t* to, int64_t pitch) {
  using Pixels = void (*)(const float*, int64_t, int64_t, const Taps&, uint8_t*, int64_t);
  static const Pixels all[kRows] = {pixels_of<1>, pixels_of<2>, pixels_of<3>, pixels_of<4>,
                                    pixels_of<5>, pixels_of<6>, pixels_of<7>, pixels_of<8>};
  all[rows - 1](from, n, left, taps, to, pitch);
}

// Two pixels: 8 floats -> 8 bfloat16 in the low halves of 8 words, rounded to nearest even.
inline __m128i bfloat_of(__m256 values) {
  const __m256i bits = _mm256_castps_si256(values);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  sum = _mm256_srli_epi32(sum, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
}

template <int32_t kChannels, int32_t kKind>
void pack_of(const float* from, int64_t n, const Normal& normal, void* out) {
  constexpr int kSize = kKind == kFloat32 ? 4 : 2;
  const __m256 scale = _mm256_set1_ps(255.0f), half = _mm256_set1_ps(0.5f);
  const float *m = normal.mean, *s = normal.std;
  const __m256 mean = _mm256_setr_ps(m[0], m[1], m[2], 0, m[0], m[1], m[2], 0);
  const __m256 std = _mm256_setr_ps(s[0], s[1], s[2], 1, s[0], s[1], s[2], 1);
  const __m256 used = _mm256_castsi256_ps(_mm256_setr_epi32(-1, -1, -1, 0, -1, -1, -1, 0));
  uint8_t* to = static_cast<uint8_t*>(out);
  // Two pixels a step. With three channels a store runs one value over its pixel, so the last
  // pixels are left to the loop.
  const int64_t even = kChannels == 4 ? n / 2 * 2 : (n - 1) / 2 * 2;
  for (int64_t i = 0; i < even; i += 2, to += 2 * kChannels * kSize) {
    __m256 value = _mm256_floor_ps(_mm256_add_ps(_mm256_loadu_ps(from + 4 * i), half));
    value = _mm256_div_ps(value, scale);
    value = _mm256_and_ps(_mm256_div_ps(_mm256_sub_ps(value, mean), std), used);
    if constexpr (kKind == kFloat32) {
      if constexpr (kChannels == 4) {
        _mm256_storeu_ps(reinterpret_cast<float*>(to), value);
      } else {
        _mm_storeu_ps(reinterpret_cast<float*>(to), _mm256_castps256_ps128(value));
        _mm_storeu_ps(reinterpret_cast<float*>(to + 12), _mm256_extractf128_ps(value, 1));
      }
    } else {
      __m128i halves;
      if constexpr (kKind == kFloat16)
        halves = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      else
        halves = bfloat_of(value);
      if constexpr (kChannels == 4) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
      } else {
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to), halves);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 6), _mm_unpackhi_epi64(halves, halves));
      }
    }
  }
  pack_loop(from + 4 * even, n - even, normal, kChannels, kKind, to);
}

void pack_avx(const float* from, int64_t n, const Normal& normal, int32_t channels, int32_t kind,
              void* out) {
  using Pack = void (*)(const float*, int64_t, const Normal&, void*);
  static const Pack packs[2][3] = {
      {pack_of<3, kFloat32>, pack_of<3, kFloat16>, pack_of<3, kBfloat16>},
      {pack_of<4, kFloat32>, pack_of<4, kFloat16>, pack_of<4, kBfloat16>}};
  packs[channels == 4][kind](from, n, normal, out);
}

}  // namespace
}  // namespace efficientad
