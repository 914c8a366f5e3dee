// Includes frame.h: launches of the CUDA kernels; errors become std::runtime_error.
//
// All memory is the caller's, on `device`; nothing is allocated and nothing waits, so the calls can
// be captured in a CUDA graph.
#pragma once

#include "frame.h"

namespace efficientad::cuda {

void resize_pack(const Frame& frame, const Taps& rows, const Taps& columns, const Normal& normal,
                 const Packed& out, int device, uintptr_t stream);

}  // namespace efficientad::cuda
