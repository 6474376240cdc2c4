// Matrices as they lie in memory, and their products with vectors, each a sum in float32.
//
// A matrix type has:
//   Taken(x)         a number as the products take it: rounded to bfloat16 for such matrices
//   Arrange(x, out)  a vector [columns] as Times takes it
//   Times(row, x)    the product of a row with an arranged vector
//   Widen(row, out)  a row as float32

#ifndef MISTRAL_MS_OPS_CPU_MATRICES_H_
#define MISTRAL_MS_OPS_CPU_MATRICES_H_

#include "common.h"

template <typename W>
struct Plain {
  const W* values;
  int64_t columns;

  INLINE Plain From(int64_t row) const { return {values + row * columns, columns}; }
  INLINE static float Taken(float x) {
    return sizeof(W) == sizeof(float) ? x : Widened(Rounded(x));
  }
  INLINE void Arrange(const float* x, float* out) const {
    for (int64_t i = 0; i < columns; ++i) out[i] = Taken(x[i]);
  }
  INLINE float Times(int64_t row, const float* x) const {
    return Dot(x, values + row * columns, columns);
  }
};

using Float32 = Plain<float>;
using Bfloat16 = Plain<uint16_t>;

// What matrices of codes share: scales [rows, groups] beside them.
struct Scaled {
  const float* scales;
  int64_t columns, groups;

  INLINE static float Taken(float x) { return x; }
};

// Whether scales are those of matrices [rows, columns] whose groups are of whole bytes.
inline bool AreScales(const int64_t* shape, int64_t E, int64_t rows, int64_t columns,
                      int64_t packed) {
  const int64_t groups = shape[2];
  return shape[0] == E && shape[1] == rows && groups > 0 && columns % (groups * packed) == 0 &&
         (packed > 1 || groups == 1);
}

// A byte each, -127 to 127; a scale for each row.
struct Int8 : Scaled {
  const int8_t* codes;

  Int8(const void* data, const float* scales, int64_t columns, int64_t groups)
      : Scaled{scales, columns, groups}, codes(static_cast<const int8_t*>(data)) {}

  INLINE Int8 From(int64_t row) const {
    return {codes + row * columns, scales + row * groups, columns, groups};
  }
  INLINE void Arrange(const float* x, float* out) const { std::copy_n(x, columns, out); }
  INLINE float Times(int64_t row, const float* x) const {
    return scales[row] * Dot(x, codes + row * columns, columns);
  }
  INLINE void Widen(int64_t row, float* out) const {
    const int8_t* own = codes + row * columns;
    const float scale = scales[row];
    for (int64_t i = 0; i < columns; ++i) out[i] = static_cast<float>(own[i]) * scale;
  }
};

// Two codes in a byte, the lower half first, each stored as code + 8; a scale for each group.
// A vector is taken as its elements with even numbers, and behind them the others.
struct Int4 : Scaled {
  const uint8_t* codes;

  Int4(const void* data, const float* scales, int64_t columns, int64_t groups)
      : Scaled{scales, columns, groups}, codes(static_cast<const uint8_t*>(data)) {}

  INLINE Int4 From(int64_t row) const {
    return {codes + row * columns / 2, scales + row * groups, columns, groups};
  }
  INLINE static float Low(uint8_t pair) { return static_cast<float>((pair & 15) - 8); }
  INLINE static float High(uint8_t pair) { return static_cast<float>((pair >> 4) - 8); }
  INLINE void Arrange(const float* x, float* out) const {
    for (int64_t i = 0; i < columns / 2; ++i) {
      out[i] = x[2 * i];
      out[columns / 2 + i] = x[2 * i + 1];
    }
  }
  INLINE float Times(int64_t row, const float* x) const {
    constexpr int64_t kAhead = 1024;
    const int64_t half = columns / 2, bytes = half / groups;
    const uint8_t* own = codes + row * half;
    const float *even = x, *odd = x + half, *scale = scales + row * groups;
    float total[kLanes] = {}, rest = 0.0f;
    for (int64_t g = 0; g < groups; ++g, own += bytes, even += bytes, odd += bytes) {
      float low[kLanes] = {}, high[kLanes] = {}, tail = 0.0f;
      int64_t i = 0;
      for (; i + kLanes <= bytes; i += kLanes) {
        __builtin_prefetch(own + i + kAhead);
        for (int64_t j = 0; j < kLanes; ++j) {
          low[j] += even[i + j] * Low(own[i + j]);
          high[j] += odd[i + j] * High(own[i + j]);
        }
      }
      for (; i < bytes; ++i) tail += even[i] * Low(own[i]) + odd[i] * High(own[i]);
      for (int64_t j = 0; j < kLanes; ++j) total[j] += scale[g] * (low[j] + high[j]);
      rest += scale[g] * tail;
    }
    return SumOfLanes(total) + rest;
  }
  INLINE void Widen(int64_t row, float* out) const {
    const int64_t half = columns / 2, bytes = half / groups;
    const uint8_t* own = codes + row * half;
    for (int64_t g = 0; g < groups; ++g) {
      const float scale = scales[row * groups + g];
      for (int64_t i = g * bytes; i < (g + 1) * bytes; ++i) {
        out[2 * i] = Low(own[i]) * scale;
        out[2 * i + 1] = High(own[i]) * scale;
      }
    }
  }
};

#endif  // MISTRAL_MS_OPS_CPU_MATRICES_H_
