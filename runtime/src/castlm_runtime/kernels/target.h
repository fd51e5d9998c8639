// Functions between BEGIN_TARGET("avx2,...") and END_TARGET are compiled for these instruction sets, whatever the rest of
// the library is compiled for; they may run only where the processor has them.

#pragma once

#define CASTLM_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define BEGIN_TARGET(features) CASTLM_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET CASTLM_PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(features) CASTLM_PRAGMA(GCC push_options) CASTLM_PRAGMA(GCC target(features))
#define END_TARGET CASTLM_PRAGMA(GCC pop_options)
#endif
