// Included in front of every file: a library that is compiled on a new glibc shall load on an old one. glibc 2.29 gave
// these functions a second version, which no longer calls an error handler that nobody sets; the values are the same.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__)
__asm__(".symver exp, exp@GLIBC_2.2.5");
__asm__(".symver log, log@GLIBC_2.2.5");
__asm__(".symver log2, log2@GLIBC_2.2.5");
__asm__(".symver pow, pow@GLIBC_2.2.5");
#endif
