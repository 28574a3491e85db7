// LMIM_SIMD before a function: it is compiled for several instruction sets, and the machine's best one runs. The
// results are the same on all: setup.py forbids the compiler to contract products and sums.

#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define LMIM_SIMD __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define LMIM_SIMD
#endif
