// Floor 0, includes frame_cuda.h and the CUDA runtime: the frame path's kernels.
//
// They do the host twin's arithmetic in its order, so frames come out with the same bits.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "frame_cuda.h"

namespace efficientad::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPixels = 32;  // output pixels of a block, all in one row
constexpr int kLines = 16;   // source rows that are held at a time, resized to the output's width

// A block resizes the source rows under its output row, a few at a time, to its pixels; each thread
// goes on with the sum of its output value over them.
template <int kKind>
__global__ void __launch_bounds__(kThreads)
    resize_pack_kernel(Frame frame, Taps rows, Taps columns, Normal normal, Packed out) {
  __shared__ float lines[kLines * kPixels * 3];
  const int line = out.width + 2 * out.border;
  const int row = blockIdx.y, x0 = blockIdx.x * kPixels;  // in the packed image
  const int y = row - out.border;
  const int channel = threadIdx.x % 4;
  const int column = x0 + threadIdx.x / 4;  // of the packed image; of the first kPixels * 4 threads
  const int x = column - out.border;
  const bool owner = threadIdx.x < kPixels * 4 && column < line && channel < out.channels;
  const bool inside = y >= 0 && y < out.height && x >= 0 && x < out.width;

  float value = 0.0f;
  if (y >= 0 && y < out.height) {  // the whole block
    const int low = max(x0 - out.border, 0);
    const int high = min(x0 - out.border + kPixels, out.width);
    const int cells = 3 * (high - low);  // below 0 where there is border only
    const bool sums_here = owner && inside && channel < 3;
    const int step = frame.channels, count = rows.spans[2 * y + 1];
    const float* weights = rows.weights + (int64_t)y * rows.width;
    const uint8_t* top = frame.data + rows.spans[2 * y] * frame.pitch;
    for (int start = 0; cells > 0 && start < count; start += kLines, top += kLines * frame.pitch) {
      const int held = min(kLines, count - start);
      for (int i = threadIdx.x; i < held * cells; i += kThreads) {
        const int k = i / cells, pixel = low + i % cells / 3, c = i % cells % 3;
        const uint8_t* at = top + k * frame.pitch + (int64_t)columns.spans[2 * pixel] * step;
        lines[i] = whole(row_sum(at + (step == 3 ? c : 0), step,
                                 columns.weights + (int64_t)pixel * columns.width,
                                 columns.spans[2 * pixel + 1]));
      }
      __syncthreads();
      if (sums_here)
        for (int k = 0; k < held; ++k)
          value = fmaf(weights[start + k], lines[k * cells + 3 * (x - low) + channel], value);
      __syncthreads();
    }
    if (sums_here) value = normalised(whole(value), normal.mean[channel], normal.std[channel]);
  }
  if (owner) store(out.data, ((int64_t)row * line + column) * out.channels + channel, value, kKind);
}

__device__ float upsampled_row(const Maps& maps, const float* map, int y, int left, int count,
                               const float* weights) {
  const float a = map_cell(maps, map, y, left);
  return count == 1 ? a : between(a, map_cell(maps, map, y, left + 1), weights[0], weights[1]);
}

__global__ void __launch_bounds__(kThreads)
    upsample_kernel(Maps maps, Taps rows, Taps columns, float* out) {
  const int x = blockIdx.x * kThreads + threadIdx.x, y = blockIdx.y;
  if (x >= columns.size) return;
  const float* map = maps.data + (int64_t)blockIdx.z * maps.height * maps.width;
  const int left = columns.spans[2 * x], count = columns.spans[2 * x + 1];
  const float* weights = columns.weights + (int64_t)x * columns.width;
  const int top = rows.spans[2 * y];
  float value = upsampled_row(maps, map, top, left, count, weights);
  if (rows.spans[2 * y + 1] == 2)
    value = between(value, upsampled_row(maps, map, top + 1, left, count, weights),
                    rows.weights[(int64_t)y * rows.width],
                    rows.weights[(int64_t)y * rows.width + 1]);
  out[((int64_t)blockIdx.z * rows.size + y) * columns.size + x] = value;
}

__global__ void __launch_bounds__(kThreads)
    overlay_kernel(Frame frame, const float* values, Colors colors, uint8_t* out) {
  const int x = blockIdx.x * kThreads + threadIdx.x, y = blockIdx.y;
  if (x >= frame.width) return;
  const float place = place_of(values[(int64_t)y * frame.width + x], colors);
  const uint8_t* color = colors.table + 3 * color_of(place);
  const float opacity = opacity_of(place, colors);
  const uint8_t* from = frame.data + y * frame.pitch + 3 * (int64_t)x;
  uint8_t* to = out + 3 * ((int64_t)y * frame.width + x);
  for (int c = 0; c < 3; ++c) to[c] = blended(from[c], color[c], opacity);
}

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(status));
}

// This module has a runtime of its own, so the caller's device is set and put back here.
class OnDevice {
 public:
  explicit OnDevice(int device) : device_(device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device_) check(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~OnDevice() {
    if (before_ != device_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0, device_;
};

}  // namespace

void resize_pack(const Frame& frame, const Taps& rows, const Taps& columns, const Normal& normal,
                 const Packed& out, int device, uintptr_t stream) {
  const OnDevice on(device);
  const dim3 grid((out.width + 2 * out.border + kPixels - 1) / kPixels, out.height + 2 * out.border);
  const auto kernel = out.kind == kFloat32   ? resize_pack_kernel<kFloat32>
                      : out.kind == kFloat16 ? resize_pack_kernel<kFloat16>
                                             : resize_pack_kernel<kBfloat16>;
  kernel<<<grid, kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(frame, rows, columns,
                                                                        normal, out);
  check(cudaGetLastError(), "resize_pack");
}

void upsample(const Maps& maps, const Taps& rows, const Taps& columns, float* out, int device,
              uintptr_t stream) {
  const OnDevice on(device);
  const dim3 grid((columns.size + kThreads - 1) / kThreads, rows.size, maps.count);
  upsample_kernel<<<grid, kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(maps, rows,
                                                                                columns, out);
  check(cudaGetLastError(), "upsample");
}

void overlay(const Frame& frame, const float* values, const Colors& colors, uint8_t* out,
             int device, uintptr_t stream) {
  const OnDevice on(device);
  const dim3 grid((frame.width + kThreads - 1) / kThreads, frame.height);
  overlay_kernel<<<grid, kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(frame, values,
                                                                               colors, out);
  check(cudaGetLastError(), "overlay");
}

}  // namespace efficientad::cuda
