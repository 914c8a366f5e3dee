// Includes host.h: convolutions of bfloat16 images, split for the threads, and whether there are any.
#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "host.h"
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef __x86_64__
#include <cpuid.h>
#endif

namespace efficientad {
namespace {

constexpr int64_t kTilesOfShare = 48;       // share the filters that are read
constexpr int64_t kProductsOfShare = 8192;  // of tiles, about: some 50 microseconds
constexpr int64_t kFew = 8192;              // products for which no other thread is woken

#if defined(__x86_64__) && defined(__linux__)
bool has(uint32_t leaf, uint32_t subleaf, uint32_t word, uint32_t bits) {
  uint32_t words[4] = {};
  if (!__get_cpuid_count(leaf, subleaf, words, words + 1, words + 2, words + 3)) return false;
  return (words[word] & bits) == bits;
}

bool supported() {
  constexpr uint32_t kOsxsave = 1u << 27, kTiles = 1u << 24 | 1u << 22, kBfloat16 = 1u << 5;
  constexpr uint32_t kState = 1u << 17 | 1u << 18;  // the tiles' configuration and data
  const std::vector<std::string> names = levels();
  if (amx_level() == nullptr) return false;
  if (std::find(names.begin(), names.end(), "avx512") == names.end()) return false;
  if (!has(1, 0, 2, kOsxsave) || !has(7, 0, 3, kTiles) || !has(7, 1, 0, kBfloat16)) return false;
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & kState) != kState) return false;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, for the process
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#else
bool supported() { return false; }
#endif

// Asked when bfloat16 is wanted for the first time, not at import: it makes signal stacks larger.
bool there() {
  static const bool answer = supported();
  return answer;
}

std::atomic<bool> wanted{true};

const AmxLevel& instructions() {
  if (!there()) throw std::runtime_error("this processor or system has no AMX with bfloat16");
  return *amx_level();
}

}  // namespace

bool amx() { return wanted && there(); }

void set_amx(bool on) {
  if (on) instructions();
  wanted = on;
}

std::vector<int64_t> amx_offsets(int64_t row, int64_t pixel, int32_t kernel, int32_t groups) {
  std::vector<int64_t> offsets;
  for (int32_t i = 0; i < (groups ? kernel : 2 * kernel); ++i)
    for (int32_t group = 0; group < std::max(groups, 1); ++group)
      for (int32_t j = 0; j < (groups ? kernel : 1); ++j)
        offsets.push_back((groups ? i : i / 2) * row + j * pixel + group * kTileSteps);
  return offsets;
}

void amx_convolve(const AmxConvolution& k, int threads) {
  const int64_t panels = (k.y.channels + kPanel - 1) / kPanel, height = k.y.height;
  if (k.y.images == 0 || height == 0 || k.y.width == 0 || panels == 0) return;
  const AmxLevel& kernels = instructions();
  int64_t steps = 0;
  for (int32_t i = 0; i < k.count; ++i) steps += k.inputs[i].steps;
  const int64_t scale = k.pool ? 2 : 1, wide = (k.width + kTileRows - 1) / kTileRows;
  // Blocks of rows, and of panels where a block of one would be too small.
  const int64_t rows = std::clamp<int64_t>(kTilesOfShare / (scale * wide), 1, height);
  const int64_t blocks = (height + rows - 1) / rows;
  const int64_t products = 2 * steps * wide * scale * rows;
  const int64_t group = std::clamp<int64_t>(kProductsOfShare / products, 1, panels);
  const int64_t parts = (panels + group - 1) / group;
  const auto share = [&](int64_t i) {
    const int64_t part = i % parts, block = i / parts % blocks;
    const AmxShare mine{i / parts / blocks, static_cast<int32_t>(height * block / blocks),
                        static_cast<int32_t>(height * (block + 1) / blocks),
                        static_cast<int32_t>(panels * part / parts),
                        static_cast<int32_t>(panels * (part + 1) / parts)};
    const AmxWindow window = amx_window(k, mine);
    kernels.convolve(k, mine, scratch(amx_scratch(amx_tiling(k, window.rows, window.width))));
  };
  const int64_t shares = k.y.images * blocks * parts;
  parallel(shares, share, shares * group * products < kFew ? 1 : threads);
}

void amx_mean_square(const AmxConvolution& k, float* y, int threads) {
  const int64_t count = static_cast<int64_t>(k.y.images) * k.height * k.width;
  const int64_t panels = (k.y.channels + kPanel - 1) / kPanel;
  std::vector<float> squares(panels * count);
  AmxConvolution all = k;
  all.squares = squares.data();
  amx_convolve(all, threads);
  std::fill(y, y + count, 0.0f);
  for (int64_t panel = 0; panel < panels; ++panel)
    for (int64_t i = 0; i < count; ++i) y[i] += squares[panel * count + i];
  for (int64_t i = 0; i < count; ++i) y[i] /= static_cast<float>(k.y.channels);
}

void amx_pack(const Pixels& x, const Bfloats& y, int threads) {
  const AmxLevel& kernels = instructions();
  parallel(
      static_cast<int64_t>(x.images) * x.height,
      [&](int64_t i) {
        const int64_t image = i / x.height, row = i % x.height;
        kernels.pack(x.data + image * x.image + row * x.row, x.width,
                   y.data + image * y.image + row * y.row);
      },
      threads);
}

void amx_resize(const Bfloats& x, const Bfloats& y, int threads) {
  const AmxLevel& kernels = instructions();
  const Axis rows(x.height, y.height), columns(x.width, y.width);
  std::vector<AmxPair> places;
  for (int32_t i = 0; i < y.width; ++i) {
    const Axis::Pair pair = columns.of(i);
    places.push_back({pair.a * x.pixel, pair.b * x.pixel, pair.weight_a, pair.weight_b});
  }
  const int64_t values = static_cast<int64_t>(y.images) * y.height * y.width * y.channels;
  parallel(
      static_cast<int64_t>(y.images) * y.height,
      [&](int64_t i) {
        const int64_t image = i / y.height, row = i % y.height;
        const uint16_t* from = x.data + image * x.image;
        const Axis::Pair up = rows.of(row);
        kernels.resize(from + up.a * x.row, from + up.b * x.row, up.weight_a, up.weight_b,
                     places.data(), y.width, x.channels, y.pixel,
                     y.data + image * y.image + row * y.row);
      },
      values < 1 << 18 ? 1 : threads);
}

}  // namespace efficientad
