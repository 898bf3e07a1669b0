// Matrix products of views. float32 runs in our own tiles on AVX2 and AVX-512, all else in ATen's BLAS.
//
// Why not the BLAS for all: these products are narrow (8 to 128 on one side), so packing and threading weigh as much as
// their arithmetic, and MKL, which torch ships, takes AVX2 on a processor that is not Intel's: 104 GFLOP/s a core of an
// EPYC 9005 on which a tile alone reaches 265. benchmarks/bench_dispatch.py shows every module beside the BLAS products
// alone. And ours do not depend on the number of threads.
#pragma once

#include "tensors.h"

namespace cegate {

// out = beta * out + alpha * a b; beta is 0 (what out held is not read) or 1.
void multiply(const Matrix& out, const Matrix& a, const Matrix& b, double alpha = 1, double beta = 0);

// out = base + alpha * a b.
void multiply_add(const Matrix& out, const Matrix& base, const Matrix& a, const Matrix& b, double alpha);

}  // namespace cegate
