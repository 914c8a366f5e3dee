// Includes pybind11 and host.h: the Python names of the module, and nothing else.
//
// Pointers and streams are integers; efficientad/ops checks every argument before it calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "host.h"
#ifdef EFFICIENTAD_CUDA
#include "frame_cuda.h"
#endif

namespace py = pybind11;
namespace ea = efficientad;

namespace {

using Address = uintptr_t;
using Side = std::tuple<Address, Address, int32_t, int32_t>;  // spans, weights, width, size
using Three = std::array<float, 3>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

ea::Taps taps(const Side& side) {
  return {pointer<const int32_t>(std::get<0>(side)), pointer<const float>(std::get<1>(side)),
          std::get<2>(side), std::get<3>(side)};
}

// -1: on the host; else the CUDA device whose stream is given.
void check(int device) {
#ifndef EFFICIENTAD_CUDA
  if (device >= 0) throw std::runtime_error("_native was built without CUDA");
#endif
  (void)device;
}

void resize_pack(Address data, int64_t pitch, int32_t height, int32_t width, int32_t channels,
                 const Side& rows, const Side& columns, const Three& mean, const Three& std,
                 Address out, int32_t border, int32_t out_channels, int32_t kind, int device,
                 Address stream) {
  check(device);
  const ea::Frame frame{pointer<const uint8_t>(data), pitch, height, width, channels};
  const ea::Normal normal{{mean[0], mean[1], mean[2]}, {std[0], std[1], std[2]}};
  const ea::Taps y = taps(rows), x = taps(columns);
  const ea::Packed packed{pointer<void>(out), y.size, x.size, border, out_channels, kind};
#ifdef EFFICIENTAD_CUDA
  if (device >= 0) return ea::cuda::resize_pack(frame, y, x, normal, packed, device, stream);
#endif
  ea::resize_pack(frame, y, x, normal, packed);
}

using Strides = std::array<int64_t, 3>;  // of an image, a row and a pixel, in floats
using Shape = std::array<int32_t, 4>;    // images, height, width, channels

ea::Pixels pixels(Address data, const Strides& strides, const Shape& shape) {
  return {pointer<float>(data), strides[0], strides[1], strides[2],
          shape[0],             shape[1],   shape[2],   shape[3]};
}

void convolve(Address x, const Strides& x_strides, const Shape& x_shape,
              const std::array<int32_t, 3>& kernel, Address filters, Address bias, Address input,
              Address output, Address y, const Strides& y_strides, const Shape& y_shape, bool add,
              bool relu, bool pool, int32_t pool_padding, int threads) {
  const ea::Convolution convolution{pixels(x, x_strides, x_shape),
                                    pixels(y, y_strides, y_shape),
                                    kernel[0],
                                    kernel[1],
                                    kernel[2],
                                    pointer<const float>(filters),
                                    pointer<const float>(bias),
                                    pointer<const float>(input),
                                    pointer<const float>(output),
                                    add,
                                    relu,
                                    pool,
                                    pool_padding};
  ea::convolve(convolution, threads);
}

void filter_gradient(Address x, const Strides& x_strides, const Shape& x_shape, int32_t kernel,
                     Address input, Address output, Address gradient, const Strides& y_strides,
                     const Shape& y_shape, Address products, int threads) {
  ea::Convolution convolution{};
  convolution.x = pixels(x, x_strides, x_shape);
  convolution.y = pixels(gradient, y_strides, y_shape);
  convolution.kernel = kernel;
  convolution.step = 1;
  convolution.input = pointer<const float>(input);
  convolution.output = pointer<const float>(output);
  ea::filter_gradient(convolution, pointer<float>(products), threads);
}

void resize(Address x, const Strides& x_strides, const Shape& x_shape, Address y,
            const Strides& y_strides, const Shape& y_shape, int threads) {
  ea::resize(pixels(x, x_strides, x_shape), pixels(y, y_strides, y_shape), threads);
}

void mean_square(Address x, int64_t count, int32_t channels, Address y, int threads) {
  ea::mean_square(pointer<const float>(x), count, channels, pointer<float>(y), threads);
}

ea::Bfloats bfloats(Address data, const Strides& strides, const Shape& shape) {
  return {pointer<uint16_t>(data), strides[0], strides[1], strides[2],
          shape[0],                shape[1],   shape[2],   shape[3]};
}

// Image, its strides, kernel, step, groups (amx_offsets), filters.
using AmxInput = std::tuple<Address, Strides, int32_t, int32_t, int32_t, Address>;

// The convolution without its outputs; `offsets` keeps what it points to.
ea::AmxConvolution amx_convolution(const std::vector<AmxInput>& inputs,
                                   const std::array<int32_t, 2>& size, Address bias,
                                   std::vector<std::vector<int64_t>>& offsets) {
  ea::AmxConvolution convolution{};
  for (const auto& [data, strides, kernel, step, groups, filters] : inputs) {
    offsets.push_back(ea::amx_offsets(strides[1], strides[2], kernel, groups));
    convolution.inputs[convolution.count++] = {pointer<const uint16_t>(data),
                                               strides[0],
                                               strides[1] * step,
                                               strides[2] * step,
                                               offsets.back().data(),
                                               static_cast<int32_t>(offsets.back().size()),
                                               pointer<const uint16_t>(filters)};
  }
  convolution.height = size[0];
  convolution.width = size[1];
  convolution.bias = pointer<const float>(bias);
  return convolution;
}

void amx_convolve(const AmxInput& input, const std::array<int32_t, 2>& size, Address bias,
                  Address y, const Strides& strides, const Shape& shape, bool relu, bool pool,
                  int32_t pool_padding, int threads) {
  std::vector<std::vector<int64_t>> offsets;
  ea::AmxConvolution convolution = amx_convolution({input}, size, bias, offsets);
  convolution.y = bfloats(y, strides, shape);
  convolution.relu = relu;
  convolution.pool = pool;
  convolution.pool_padding = pool_padding;
  ea::amx_convolve(convolution, threads);
}

void amx_mean_square(const std::vector<AmxInput>& inputs, Address bias, const Shape& shape,
                     Address y, int threads) {
  std::vector<std::vector<int64_t>> offsets;
  ea::AmxConvolution convolution =
      amx_convolution(inputs, {shape[1], shape[2]}, bias, offsets);
  convolution.y = bfloats(0, {}, shape);
  ea::amx_mean_square(convolution, pointer<float>(y), threads);
}

void amx_pack(Address x, const Strides& x_strides, const Shape& x_shape, Address y,
              const Strides& y_strides, const Shape& y_shape, int threads) {
  ea::amx_pack(pixels(x, x_strides, x_shape), bfloats(y, y_strides, y_shape), threads);
}

void amx_resize(Address x, const Strides& x_strides, const Shape& x_shape, Address y,
                const Strides& y_strides, const Shape& y_shape, int threads) {
  ea::amx_resize(bfloats(x, x_strides, x_shape), bfloats(y, y_strides, y_shape), threads);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  using Free = py::call_guard<py::gil_scoped_release>;
#ifdef EFFICIENTAD_CUDA
  module.attr("cuda_architectures") = EFFICIENTAD_CUDA;
#else
  module.attr("cuda_architectures") = "";
#endif
  module.def("levels", &ea::levels);
  module.def("level", &ea::level);
  module.def("set_level", &ea::set_level);
  module.def("threads", &ea::threads);
  module.def("set_threads", &ea::set_threads, Free());
  module.def("taps_width", &ea::taps_width);
  module.def("fill_taps", [](int32_t source, int32_t target, bool antialias, Address spans,
                             Address weights) {
    ea::fill_taps(source, target, antialias, pointer<int32_t>(spans), pointer<float>(weights));
  });
  module.def("resize_pack", &resize_pack, Free());
  module.def("convolve", &convolve, Free());
  module.def("filter_gradient", &filter_gradient, Free());
  module.def("resize", &resize, Free());
  module.def("mean_square", &mean_square, Free());
  module.def("amx", &ea::amx);
  module.def("set_amx", &ea::set_amx);
  module.def("amx_convolve", &amx_convolve, Free());
  module.def("amx_mean_square", &amx_mean_square, Free());
  module.def("amx_pack", &amx_pack, Free());
  module.def("amx_resize", &amx_resize, Free());
}
