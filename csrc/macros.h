// What lets one header serve nvcc and every host compilation.
#pragma once

#if defined(__CUDACC__)
#define DAB_INLINE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define DAB_INLINE __forceinline
#else
#define DAB_INLINE inline __attribute__((always_inline))
#endif

// The CPU loops are compiled once per instruction set. Everything they inline lives in a namespace of that name, so
// that the linker can never replace the portable copy of a function by the one compiled for AVX-512.
#if !defined(DAB_ISA)
#define DAB_ISA portable
#endif
