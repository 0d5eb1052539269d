// Marks a function that the CPU code and the GPU code share.
#pragma once

#if defined(__CUDACC__)
#define DML_PORTABLE __host__ __device__
#else
#define DML_PORTABLE
#endif
