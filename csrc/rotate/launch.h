// The launcher of lrq::_rotate_rows. It returns the error of its launch and waits for nothing.
#pragma once

#include <cuda_runtime_api.h>

#include "rotate_quantize.h"

namespace lrq {

// args of a problem that supports_rotate_rows, with at least one token.
cudaError_t launch_rotate_rows(const RotateRowsArgs& args, cudaStream_t stream);

}  // namespace lrq
