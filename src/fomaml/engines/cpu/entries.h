// The functions of a file of kernels, by dtype.
#pragma once

// what ENTRY(name, type) defines, of each dtype or of ONLY one
#if !defined(ONLY)
#define ENTRIES ENTRY(float32, float) ENTRY(float64, double)
#elif ONLY == 32
#define ENTRIES ENTRY(float32, float)
#else
#define ENTRIES ENTRY(float64, double)
#endif
