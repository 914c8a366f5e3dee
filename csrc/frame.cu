// Includes frame_cuda.h, the CUDA runtime and dlopen: the frame path's kernels.
//
// They do the host twin's arithmetic in its order, so frames come out with the same bits.
#include <cuda_runtime.h>
#include <dlfcn.h>

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

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(status));
}

// The driver's functions that tell and set the calling thread's context; 0 is success. They are
// looked up, so that the module loads where there is no driver.
struct Contexts {
  using Get = int (*)(void**);
  using Set = int (*)(void*);
  Get get = nullptr;
  Set set = nullptr;

  Contexts() {
    if (void* driver = dlopen("libcuda.so.1", RTLD_NOW)) {
      get = reinterpret_cast<Get>(dlsym(driver, "cuCtxGetCurrent"));
      set = reinterpret_cast<Set>(dlsym(driver, "cuCtxSetCurrent"));
    }
  }
};

// The launch's device, whose context is there: its memory is in it. The caller's context is put
// back and not its device, since cudaSetDevice makes a context on a device that had none.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    static const Contexts found;
    contexts_ = &found;
    if (!found.get || !found.set || found.get(&before_) != 0)
      throw std::runtime_error("CUDA: the driver does not tell the current context");
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() { contexts_->set(before_); }

 private:
  const Contexts* contexts_;
  void* before_ = nullptr;
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

}  // namespace efficientad::cuda
