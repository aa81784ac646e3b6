// Functions that the processor and the GPU share: tests compile them for the processor.
#pragma once

#if defined(__CUDACC__)
#define FLOWRL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FLOWRL_HOST_DEVICE inline
#endif
