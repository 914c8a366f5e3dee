// Includes avx.h and conv_*.h: the level of processors with AVX-512 (F, BW, DQ, VL); empty
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

// Eight rows lie side by side: 4 * (8 * pixel + row) + channel. Rows that are not there repeat the
// first, pixels that are not there are zeros.
void spread_avx512(const uint8_t* at, int64_t pitch, int32_t channels, int rows, int64_t n,
                   float* to) {
  static_assert(kRows == 8);
  constexpr char kNone = -128;
  const __m128i order =
      channels == 3
          ? _mm_setr_epi8(0, 1, 2, kNone, 3, 4, 5, kNone, 6, 7, 8, kNone, 9, 10, 11, kNone)
          : _mm_setr_epi8(0, 0, 0, kNone, 1, 1, 1, kNone, 2, 2, 2, kNone, 3, 3, 3, kNone);
  const auto floats = [](__m128i bytes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
  };
  for (int64_t x = 0; x < n; x += 4, at += 4 * channels, to += 4 * 32) {
    const int64_t bytes = channels * (n - x < 4 ? n - x : 4);
    const __mmask16 mask = static_cast<__mmask16>((1u << bytes) - 1);
    for (int half = 0; half < 2; ++half) {
      __m128i v[4];
      for (int r = 0; r < 4; ++r) {
        const int row = 4 * half + r < rows ? 4 * half + r : 0;
        v[r] = _mm_shuffle_epi8(_mm_maskz_loadu_epi8(mask, at + row * pitch), order);
      }
      const __m128i low01 = _mm_unpacklo_epi32(v[0], v[1]), low23 = _mm_unpacklo_epi32(v[2], v[3]);
      const __m128i high01 = _mm_unpackhi_epi32(v[0], v[1]);
      const __m128i high23 = _mm_unpackhi_epi32(v[2], v[3]);
      float* rows_here = to + 16 * half;
      _mm512_storeu_ps(rows_here, floats(_mm_unpacklo_epi64(low01, low23)));
      _mm512_storeu_ps(rows_here + 32, floats(_mm_unpackhi_epi64(low01, low23)));
      _mm512_storeu_ps(rows_here + 64, floats(_mm_unpacklo_epi64(high01, high23)));
      _mm512_storeu_ps(rows_here + 96, floats(_mm_unpackhi_epi64(high01, high23)));
    }
  }
}

// One output pixel of eight rows: two sums.
struct Eight {
  __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
  void add(float weight, const float* at) {
    const __m512 w = _mm512_set1_ps(weight);
    low = _mm512_fmadd_ps(w, _mm512_loadu_ps(at), low);
    high = _mm512_fmadd_ps(w, _mm512_loadu_ps(at + 16), high);
  }
  void store(int rows, uint8_t* to, int64_t pitch) const {
    const __m512 half = _mm512_set1_ps(0.5f);
    alignas(16) int32_t levels[8];
    _mm_store_si128(reinterpret_cast<__m128i*>(levels),
                    _mm512_cvtusepi32_epi8(_mm512_cvttps_epi32(_mm512_add_ps(low, half))));
    _mm_store_si128(reinterpret_cast<__m128i*>(levels + 4),
                    _mm512_cvtusepi32_epi8(_mm512_cvttps_epi32(_mm512_add_ps(high, half))));
    for (int row = 0; row < rows; ++row) memcpy(to + row * pitch, levels + row, 4);
  }
};

// Two output pixels at a time: four sums hide the time of an addition.
void pixels_avx512(const float* from, int64_t, int64_t left, int rows, const Taps& taps,
                   uint8_t* to, int64_t pitch) {
  for (int32_t i = 0; i < taps.size; i += 2) {
    const int32_t j = i + 1 < taps.size ? i + 1 : i;
    const int32_t *span = taps.spans + 2 * i, *next = taps.spans + 2 * j;
    const float* weights = taps.weights + static_cast<int64_t>(i) * taps.width;
    const float* next_weights = taps.weights + static_cast<int64_t>(j) * taps.width;
    const float *at = from + 32 * (span[0] - left), *next_at = from + 32 * (next[0] - left);
    const int32_t both = span[1] < next[1] ? span[1] : next[1];
    Eight one, two;
    for (int32_t k = 0; k < both; ++k) {
      one.add(weights[k], at + 32 * k);
      two.add(next_weights[k], next_at + 32 * k);
    }
    for (int32_t k = both; k < span[1]; ++k) one.add(weights[k], at + 32 * k);
    for (int32_t k = both; k < next[1]; ++k) two.add(next_weights[k], next_at + 32 * k);
    one.store(rows, to + 4 * i, pitch);
    two.store(rows, to + 4 * j, pitch);
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
    spread_avx512,
    pixels_avx512,
    pack_avx,
    blend_loop,
    convolve_share<Vector>,
    gradient_rows<Vector>,
    gradient_products<Vector>,
};

}  // namespace efficientad
#endif
