// Floor 0, includes pybind11 and host.h: the Python names of the module, and nothing else.
//
// Pointers and streams are integers; efficientad/frames.py checks every argument before it calls.
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

void upsample(Address data, int32_t count, int32_t height, int32_t width, int32_t padding,
              float frame, const Side& rows, const Side& columns, Address out, int device,
              Address stream) {
  check(device);
  const ea::Maps maps{pointer<const float>(data), count, height, width, padding, frame};
#ifdef EFFICIENTAD_CUDA
  if (device >= 0)
    return ea::cuda::upsample(maps, taps(rows), taps(columns), pointer<float>(out), device, stream);
#endif
  ea::upsample(maps, taps(rows), taps(columns), pointer<float>(out));
}

void overlay(Address data, int64_t pitch, int32_t height, int32_t width, Address values,
             Address table, float low, float range, float strength, Address out, int device,
             Address stream) {
  check(device);
  const ea::Frame frame{pointer<const uint8_t>(data), pitch, height, width, 3};
  const ea::Colors colors{pointer<const uint8_t>(table), low, range, strength};
  const float* map = pointer<const float>(values);
#ifdef EFFICIENTAD_CUDA
  if (device >= 0)
    return ea::cuda::overlay(frame, map, colors, pointer<uint8_t>(out), device, stream);
#endif
  ea::overlay(frame, map, colors, pointer<uint8_t>(out));
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
  module.def("upsample", &upsample, Free());
  module.def("overlay", &overlay, Free());
}
