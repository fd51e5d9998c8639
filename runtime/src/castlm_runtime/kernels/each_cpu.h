// Macros for loops that the compiler vectorizes: how a function is compiled for several processors, and into its callers.

#pragma once

#define INLINE inline __attribute__((always_inline))

// A function that is compiled for each level of x86-64 and picked when the library is loaded. With clang, it is compiled once,
// for the baseline: before version 18, clang takes these levels and never selects them (llvm-project issue 55830), and later
// versions are untested.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EACH_CPU
#endif
