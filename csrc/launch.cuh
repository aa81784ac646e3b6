// How the CUDA kernels are launched. tests/kernels/emulated/ has another one, for the processor.
#pragma once

#include <cuda_runtime.h>

#include "cuda_operators.h"

namespace flowrl::cuda {

// Null, or why the launch was refused.
template <class Kernel, class... Arguments>
const char* launch(Kernel kernel, dim3 grid, dim3 block, Stream stream, Arguments... arguments) {
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace flowrl::cuda
