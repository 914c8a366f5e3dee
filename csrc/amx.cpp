// Includes amx.h: a share of a bfloat16 convolution, for processors with AMX; empty where the
// compiler knows no such instructions.
//
// No C++ library here, as in level.h.
#include "amx.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
#include <immintrin.h>

namespace efficientad {
namespace {

// Steps whose filters are read by all tiles of a share before the next: 2 KB each, kept in the
// first-level cache beside the inputs of two tiles.
constexpr int kChunk = 16;
constexpr int64_t kFilters = 2 * kTileRows * kTileSteps;  // bfloat16 of a step and panel
constexpr int64_t kProducts = kTileRows * kPanel;         // floats of a tile

struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3: products of two tiles of outputs and two of channels; 4 and 5: inputs; 6 and 7:
// filters.
void configure(int outputs) {
  TileConfiguration tiles;
  for (int i = 0; i < 8; ++i) {
    tiles.row_bytes[i] = 64;
    tiles.rows[i] = static_cast<uint8_t>(i < 6 ? outputs : kTileRows);
  }
  asm volatile("" : : "r"(&tiles) : "memory");  // tile instructions don't say what they read
  _tile_loadconfig(&tiles);
}

// Fetches into the second-level cache what comes after the present chunk.
struct Ahead {
  const char* at;
  const char* end;
  int lines;  // a step
  void fetch() {
    for (int i = 0; i < lines && at < end; ++i, at += 64) _mm_prefetch(at, _MM_HINT_T1);
  }
};

// Products (+)= `steps` steps of one or two tiles of outputs.
template <bool kTwo>
inline void multiply(const uint16_t* a, const uint16_t* b, int64_t stride, const int64_t* offsets,
                     int steps, const uint16_t* filters, float* products, bool first,
                     Ahead& ahead) {
  constexpr int kRow = kPanel * sizeof(float);
  float* const more = products + kProducts;
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    if (kTwo) {
      _tile_zero(2);
      _tile_zero(3);
    }
  } else {
    _tile_loadd(0, products, kRow);
    _tile_loadd(1, products + kTileRows, kRow);
    if (kTwo) {
      _tile_loadd(2, more, kRow);
      _tile_loadd(3, more + kTileRows, kRow);
    }
  }
  for (int s = 0; s < steps; ++s, filters += kFilters) {
    _tile_loadd(6, filters, 64);
    _tile_loadd(4, a + offsets[s], stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, filters + kFilters / 2, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (kTwo) {
      _tile_loadd(5, b + offsets[s], stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    ahead.fetch();
  }
  _tile_stored(0, products, kRow);
  _tile_stored(1, products + kTileRows, kRow);
  if (kTwo) {
    _tile_stored(2, more, kRow);
    _tile_stored(3, more + kTileRows, kRow);
  }
}

// All products of a share and one panel.
void products_of(const AmxConvolution& k, const AmxTiling& t, int64_t panel,
                 const uint16_t* const* starts, float* products) {
  const int64_t tiles = static_cast<int64_t>(t.lines) * t.tiles;
  bool first = true;
  for (int32_t i = 0; i < k.count; ++i, starts += tiles) {
    const AmxInput& x = k.inputs[i];
    const int64_t stride = x.pixel * sizeof(uint16_t);
    const uint16_t* filters = x.filters + panel * x.steps * kFilters;
    for (int32_t s = 0; s < x.steps; s += kChunk, filters += kChunk * kFilters, first = false) {
      const int steps = x.steps - s < kChunk ? x.steps - s : kChunk;
      const int64_t turns = (tiles + 1) / 2 * steps, bytes = kFilters * sizeof(uint16_t);
      const char* next = reinterpret_cast<const char*>(filters) + steps * bytes;
      Ahead ahead{next, next + kChunk * bytes,
                  static_cast<int>((kChunk * bytes / 64 + turns - 1) / turns)};
      if (ahead.lines > 4) ahead.lines = 4;
      for (int64_t tile = 0; tile < tiles; tile += 2) {
        float* const to = products + tile * kProducts;
        if (tile + 1 < tiles)
          multiply<true>(starts[tile], starts[tile + 1], stride, x.offsets + s, steps, filters, to,
                         first, ahead);
        else
          multiply<false>(starts[tile], nullptr, stride, x.offsets + s, steps, filters, to, first,
                          ahead);
      }
    }
  }
}

// Where the products of a row's outputs lie: one behind the other, but for a line's last tile.
struct Cells {
  Cells(const AmxTiling& t, const float* products, int64_t row)
      : from(products + (t.flat ? 0 : row) * t.tiles * kProducts),
        first(t.flat ? row * t.pitch : 0),
        last((t.tiles - 1) * kTileRows),
        shift(t.tiles > 1 ? t.tiles * kTileRows - t.length : 0) {}
  const float* at(int64_t column) const {
    const int64_t place = first + column;
    return from + (place + (place >= last ? shift : 0)) * kPanel;
  }
  const float* from;
  int64_t first, last, shift;
};

struct Two {
  __m512 low, high;
};

inline Two finished(const float* from, Two bias, bool relu) {
  Two v{_mm512_add_ps(_mm512_load_ps(from), bias.low),
        _mm512_add_ps(_mm512_load_ps(from + 16), bias.high)};
  if (relu) {  // of a NaN and a number the instruction returns its second operand
    v.low = _mm512_max_ps(_mm512_setzero_ps(), v.low);
    v.high = _mm512_max_ps(_mm512_setzero_ps(), v.high);
  }
  return v;
}

inline void store(uint16_t* to, Two v, __mmask32 mask) {
  _mm512_mask_storeu_epi16(to, mask, (__m512i)_mm512_cvtne2ps_pbh(v.high, v.low));
}

// Outputs of a panel from their products.
void outputs_of(const AmxConvolution& k, const AmxShare& share, const AmxWindow& w,
                const AmxTiling& t, int64_t panel, const float* products) {
  const float* const b = k.bias + panel * kPanel;
  const Two bias{_mm512_loadu_ps(b), _mm512_loadu_ps(b + 16)};
  if (k.y.data == nullptr) {
    const int64_t plane = static_cast<int64_t>(k.height) * k.width;
    float* to = k.squares + (panel * k.y.images + share.image) * plane +
                static_cast<int64_t>(share.row) * k.width;
    for (int32_t row = 0; row < w.rows; ++row) {
      const Cells cells(t, products, row);
      for (int32_t column = 0; column < k.width; ++column) {
        const Two v = finished(cells.at(column), bias, k.relu);
        *to++ = _mm512_reduce_add_ps(
            _mm512_fmadd_ps(v.low, v.low, _mm512_mul_ps(v.high, v.high)));
      }
    }
    return;
  }
  const int64_t left = k.y.channels - panel * kPanel;
  const __mmask32 mask = left < kPanel ? (1u << left) - 1 : ~0u;
  uint16_t* const y = k.y.data + share.image * k.y.image + panel * kPanel;
  if (!k.pool) {
    for (int32_t row = 0; row < w.rows; ++row) {
      const Cells cells(t, products, row);
      uint16_t* to = y + (share.row + row) * k.y.row;
      for (int32_t column = 0; column < k.width; ++column, to += k.y.pixel)
        store(to, finished(cells.at(column), bias, k.relu), mask);
    }
    return;
  }
  const __m512 quarter = _mm512_set1_ps(0.25f);
  for (int32_t row = share.row; row < share.row_end; ++row) {
    uint16_t* to = y + row * k.y.row;
    const int32_t above = 2 * row - k.pool_padding;
    const Cells rows[2] = {{t, products, above - w.row}, {t, products, above + 1 - w.row}};
    const bool there[2] = {above >= 0, above + 1 < k.height};
    for (int32_t column = 0; column < k.y.width; ++column, to += k.y.pixel) {
      const int32_t left = 2 * column - k.pool_padding;
      Two sum{_mm512_setzero_ps(), _mm512_setzero_ps()};
      const auto add = [&](const Cells& cells, int32_t c) {
        const Two v = finished(cells.at(c), bias, k.relu);
        sum = {_mm512_add_ps(sum.low, v.low), _mm512_add_ps(sum.high, v.high)};
      };
      for (int i = 0; i < 2; ++i) {
        if (!there[i]) continue;
        if (left >= 0) add(rows[i], left);
        if (left + 1 < k.width) add(rows[i], left + 1);
      }
      store(to, {_mm512_mul_ps(sum.low, quarter), _mm512_mul_ps(sum.high, quarter)}, mask);
    }
  }
}

void convolve(const AmxConvolution& k, const AmxShare& share, float* scratch) {
  const AmxWindow w = amx_window(k, share);
  const AmxTiling t = amx_tiling(k, w.rows, w.width);
  const int outputs = static_cast<int>(t.length < kTileRows ? t.length : kTileRows);
  const uint16_t** const starts = reinterpret_cast<const uint16_t**>(scratch);
  float* const products = scratch + amx_starts(t);
  const uint16_t** start = starts;
  for (int32_t i = 0; i < k.count; ++i) {
    const AmxInput& x = k.inputs[i];
    const uint16_t* const from = x.data + share.image * x.image + w.row * x.row;
    for (int32_t line = 0; line < t.lines; ++line)
      for (int32_t tile = 0; tile < t.tiles; ++tile) {
        int64_t place = static_cast<int64_t>(tile) * kTileRows;
        if (place + outputs > t.length) place = t.length - outputs;
        *start++ = from + line * x.row + place * x.pixel;
      }
  }
  configure(outputs);
  for (int64_t panel = share.panel; panel < share.panel_end; ++panel) {
    products_of(k, t, panel, starts, products);
    outputs_of(k, share, w, t, panel, products);
  }
  _tile_release();
}

void pack(const float* from, int64_t n, uint16_t* to) {
  for (int64_t i = 0; i < n; ++i, from += 3, to += 8) {
    const __m128 value = _mm_maskz_loadu_ps(7, from);
    const __m128i high = (__m128i)_mm_cvtneps_pbh(value);
    const __m128 rounded = _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(high), 16));
    const __m128i low = (__m128i)_mm_cvtneps_pbh(_mm_sub_ps(value, rounded));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi64(high, low));
  }
}

inline __m512 floats_at(const uint16_t* from, __mmask16 mask) {
  const __m256i values = _mm256_maskz_loadu_epi16(mask, from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

void resize(const uint16_t* above, const uint16_t* below, float weight_above, float weight_below,
            const AmxPair* columns, int64_t n, int64_t channels, int64_t pixel,
            uint16_t* to) {
  const __m512 wa = _mm512_set1_ps(weight_above), wb = _mm512_set1_ps(weight_below);
  for (int64_t i = 0; i < n; ++i, to += pixel) {
    const AmxPair& at = columns[i];
    const __m512 left = _mm512_set1_ps(at.weight_a), right = _mm512_set1_ps(at.weight_b);
    for (int64_t c = 0; c < channels; c += 16) {
      const int64_t rest = channels - c;
      const __mmask16 mask = rest < 16 ? (1u << rest) - 1 : 0xffff;
      const auto between = [&](int64_t place) {
        const __m512 a = _mm512_mul_ps(wa, floats_at(above + place + c, mask));
        return weight_below == 0 ? a : _mm512_fmadd_ps(wb, floats_at(below + place + c, mask), a);
      };
      __m512 value = _mm512_mul_ps(left, between(at.a));
      if (at.weight_b != 0) value = _mm512_fmadd_ps(right, between(at.b), value);
      _mm256_mask_storeu_epi16(to + c, mask, (__m256i)_mm512_cvtneps_pbh(value));
    }
  }
}

const AmxLevel kLevel = {convolve, pack, resize};

}  // namespace

const AmxLevel* amx_level() { return &kLevel; }

}  // namespace efficientad
#else
namespace efficientad {

const AmxLevel* amx_level() { return nullptr; }

}  // namespace efficientad
#endif
