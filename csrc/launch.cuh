// What every launch of a CUDA kernel needs.
#pragma once

#include <cuda_runtime.h>

namespace flowrl::cuda {

// Null, or why the kernel just launched was refused.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace flowrl::cuda
