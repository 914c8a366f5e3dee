// Includes host.h: the host twin, split into blocks of rows for the threads.
//
// Rows are resized first and rounded to whole levels, then columns, as Pillow does: so a frame gives
// the network what it gives the reference. (Where a frame shrinks much more in height than in width,
// Pillow 13 turns the order around; there more levels differ by one.)
#include "host.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

namespace efficientad {
namespace {

// Values; less is done (in under half a millisecond) before a thread that has to be woken, on
// processors that are busy with something else, would have returned its share.
constexpr int64_t kSmall = 1 << 20;

#ifdef __x86_64__
bool supported(const Level* level) {
  __builtin_cpu_init();
  if (level == &kPortable) return true;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("f16c"))
    return false;
  return level == &kAvx2 ||
         (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"));
}
const Level* const kAll[] = {&kAvx512, &kAvx2, &kPortable};
#else
bool supported(const Level*) { return true; }
const Level* const kAll[] = {&kPortable};
#endif

const Level* best() {
  return *std::find_if(std::begin(kAll), std::end(kAll), supported);
}

std::atomic<const Level*> chosen{nullptr};

constexpr int64_t kShare = 32;  // output rows; neighbours resize one output row's source rows twice
constexpr int32_t kBlock = 32;  // output pixels whose source pixels stay in the first-level cache

// body(first row, end) over all rows, in steps of `step`.
void over_rows(int64_t rows, int64_t step, int64_t values,
               const std::function<void(int64_t, int64_t)>& body) {
  if (values < kSmall) return body(0, rows);
  parallel((rows + step - 1) / step,
           [&](int64_t i) { body(i * step, std::min((i + 1) * step, rows)); });
}

}  // namespace

const Level& current() {
  const Level* level = chosen.load(std::memory_order_relaxed);
  if (level == nullptr) chosen = level = best();
  return *level;
}

float* scratch(int64_t floats) {
  constexpr int64_t kLine = 16;  // floats
  thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < floats + kLine) memory.resize(floats + kLine);
  const uintptr_t at = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (-at / sizeof(float)) % kLine;
}

std::vector<std::string> levels() {
  std::vector<std::string> names;
  for (const Level* level : kAll)
    if (supported(level)) names.push_back(level->name);
  return names;
}

std::string level() { return current().name; }

void set_level(const std::string& name) {
  if (name.empty()) {
    chosen = best();
    return;
  }
  for (const Level* level : kAll)
    if (name == level->name && supported(level)) {
      chosen = level;
      return;
    }
  throw std::invalid_argument("level is '" + name + "'; this processor does not have it");
}

void resize_pack(const Frame& frame, const Taps& rows, const Taps& columns, const Normal& normal,
                 const Packed& out) {
  const Level& level = current();
  const int64_t row_bytes = static_cast<int64_t>(frame.width) * frame.channels;
  const int64_t spread = 4 * kRows * (static_cast<int64_t>(frame.width) + 3);  // floats of a block
  const int64_t pixel = (out.kind == kFloat32 ? 4 : 2) * out.channels;
  const int64_t line = pixel * (out.width + 2 * out.border), side = pixel * out.border;
  uint8_t* const image = static_cast<uint8_t*>(out.data);
  memset(image, 0, line * out.border);
  memset(image + line * (out.border + out.height), 0, line * out.border);

  const auto store = [&](const float* sums, int64_t y) {
    uint8_t* to = image + line * (out.border + y);
    memset(to, 0, side);
    level.pack(sums, out.width, normal, out.channels, out.kind, to + side);
    memset(to + line - side, 0, side);
  };
  const int64_t wide = 4 * static_cast<int64_t>(out.width);
  const int64_t values = row_bytes * std::max(frame.height, out.height);
  over_rows(out.height, kShare, values, [&](int64_t first, int64_t end) {
    int64_t top = frame.height, bottom = 0;
    for (int64_t y = first; y < end; ++y) {
      const int64_t start = rows.spans[2 * y], stop = start + rows.spans[2 * y + 1];
      top = std::min(top, start);
      bottom = std::max(bottom, stop);
    }
    float* pixels = scratch(spread + wide + (bottom - top) * wide / 4);
    float* sums = pixels + spread;
    uint8_t* levels = reinterpret_cast<uint8_t*>(sums + wide);
    for (int64_t y = top; y < bottom; y += kRows) {
      const int count = static_cast<int>(std::min<int64_t>(kRows, bottom - y));
      for (int32_t x = 0; x < out.width; x += kBlock) {
        const int32_t size = std::min(kBlock, out.width - x);
        const int32_t* spans = columns.spans + 2 * x;
        const Taps here = {spans, columns.weights + static_cast<int64_t>(x) * columns.width,
                           columns.width, size};
        const int64_t left = spans[0], n = spans[2 * size - 2] + spans[2 * size - 1] - left;
        const uint8_t* at = frame.data + y * frame.pitch + left * frame.channels;
        level.spread(at, frame.pitch, frame.channels, count, n, pixels);
        level.pixels(pixels, n, left, count, here, levels + (y - top) * wide + 4 * x, wide);
      }
    }
    for (int64_t y = first; y < end; ++y) {
      const int32_t* span = rows.spans + 2 * y;
      level.columns(levels + (span[0] - top) * wide, wide, rows.weights + y * rows.width, span[1],
                    wide, sums);
      store(sums, y);
    }
  });
}

}  // namespace efficientad
