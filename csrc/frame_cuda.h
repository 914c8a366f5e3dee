// Floor 0, includes frame.h: launches of the CUDA kernels; errors become std::runtime_error.
//
// All memory is the caller's, on `device`; nothing is allocated and nothing waits, so the calls can
// be captured in a CUDA graph.
#pragma once

#include "frame.h"

namespace efficientad::cuda {

void resize_pack(const Frame& frame, const Taps& rows, const Taps& columns, const Normal& normal,
                 const Packed& out, int device, uintptr_t stream);
void upsample(const Maps& maps, const Taps& rows, const Taps& columns, float* out, int device,
              uintptr_t stream);
void overlay(const Frame& frame, const float* values, const Colors& colors, uint8_t* out,
             int device, uintptr_t stream);

}  // namespace efficientad::cuda
