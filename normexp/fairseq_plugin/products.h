// Products of small matrices that lie in the cache: attention's, of one head of one sentence.
#pragma once

#include <algorithm>
#include <cstdint>

namespace {

#ifdef __AVX512F__
constexpr int kVectorBytes = 64;
#else
constexpr int kVectorBytes = 32;
#endif
constexpr int kTileRows = 6, kTileVectors = 2;  // 12 sums, which fit into 16 registers

// Vectors at any address. Not one template: g++ ignores such attributes of a type parameter.
template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Type __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <>
struct VectorOf<double> {
  typedef double Type __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};

template <typename T>
constexpr int kWidth = kVectorBytes / sizeof(T);  // elements of a vector

// Round a number of columns up to whole vectors.
template <typename T>
int64_t whole_vectors(int64_t columns) {
  return (columns + kWidth<T> - 1) / kWidth<T> * kWidth<T>;
}

// A matrix given by the distances of neighbours in its rows and in its columns.
template <typename T>
struct Strided {
  const T* data;
  int64_t down, right;
};

// One tile of c += a b: R rows, V vectors of columns.
template <int R, int V, typename T>
inline void add_tile(Strided<T> a, const T* b, int64_t b_row, T* c, int64_t c_row, int64_t depth) {
  using Vector = typename VectorOf<T>::Type;
  Vector sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      sums[r][v] = *reinterpret_cast<const Vector*>(c + r * c_row + v * kWidth<T>);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      right[v] = *reinterpret_cast<const Vector*>(b + k * b_row + v * kWidth<T>);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      T left = a.data[r * a.down + k * a.right];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      *reinterpret_cast<Vector*>(c + r * c_row + v * kWidth<T>) = sums[r][v];
    }
  }
}

// The last rows, fewer than a whole tile has: R of them, or fewer still.
template <int R, int V, typename T>
inline void add_last_rows(Strided<T> a, const T* b, int64_t b_row, T* c, int64_t c_row,
                          int64_t rows, int64_t depth) {
  if constexpr (R > 0) {
    if (rows == R) {
      add_tile<R, V>(a, b, b_row, c, c_row, depth);
    } else {
      add_last_rows<R - 1, V>(a, b, b_row, c, c_row, rows, depth);
    }
  }
}

template <int V, typename T>
inline void add_columns(Strided<T> a, const T* b, int64_t b_row, T* c, int64_t c_row, int64_t rows,
                        int64_t depth) {
  for (; rows >= kTileRows; rows -= kTileRows) {
    add_tile<kTileRows, V>(a, b, b_row, c, c_row, depth);
    a.data += kTileRows * a.down;
    c += kTileRows * c_row;
  }
  add_last_rows<kTileRows - 1, V>(a, b, b_row, c, c_row, rows, depth);
}

// c += a b with a (rows, depth), b (depth, columns) and c (rows, columns). columns: whole vectors.
template <typename T>
void add_product(Strided<T> a, const T* b, int64_t b_row, T* c, int64_t c_row, int64_t rows,
                 int64_t columns, int64_t depth) {
  constexpr int64_t step = kTileVectors * kWidth<T>;
  int64_t at = 0;
  for (; at + step <= columns; at += step) {
    add_columns<kTileVectors>(a, b + at, b_row, c + at, c_row, rows, depth);
  }
  if (at < columns) add_columns<1>(a, b + at, b_row, c + at, c_row, rows, depth);
}

}  // namespace
