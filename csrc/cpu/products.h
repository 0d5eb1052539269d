// Matrix products of tiles, c = a b or c += a b, through PyTorch's CPU matrix product.
#pragma once
#include <cstdint>

namespace dml::cpu {

// A matrix in memory that others hold; strides count elements.
template <class T>
struct Mat {
  T* data;
  std::int64_t rows, cols, row_stride, col_stride = 1;

  Mat<T> transposed() const { return {data, cols, rows, col_stride, row_stride}; }
  Mat<T> row_block(std::int64_t first, std::int64_t count) const {
    return {data + first * row_stride, count, cols, row_stride, col_stride};
  }
  T* row(std::int64_t i) const { return data + i * row_stride; }
};

// P is float, double or bf16 (fp32 accumulation inside, rounded once at the end). Called from inside a parallel region
// it runs on the calling thread alone, so the bits do not depend on the number of threads.
template <class P>
void multiply(Mat<const P> a, Mat<const P> b, Mat<P> c, bool accumulate);

}  // namespace dml::cpu
