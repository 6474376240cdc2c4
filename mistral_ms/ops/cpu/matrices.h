// Matrices as they lie in memory, and their products with vectors, each a sum in float32.
//
// A matrix type has:
//   Taken(x)         a number as the products take it: rounded to bfloat16 for such matrices
//   Arrange(x, out)  a vector [columns] as Times takes it
//   Times(row, x)    the product of a row with an arranged vector
//   Widen(row, first, count, out)  some columns of a row, of int4 whole bytes, as float32

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

// Vectors of the compiler's own: of loops over numbers of two sizes it makes none.
typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));
typedef uint8_t Pairs __attribute__((vector_size(kLanes)));

template <typename V, typename T>
INLINE V Load(const T* from) {
  V vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

INLINE Floats AsFloats(Bytes bytes) {
#if defined(__x86_64__)
  asm("" : "+x"(bytes));  // bytes that it finds in memory the compiler converts one by one
#endif
#if defined(__clang__) || __GNUC__ >= 9
  return __builtin_convertvector(__builtin_convertvector(bytes, Ints), Floats);
#else
  Floats values;
  for (int64_t j = 0; j < kLanes; ++j) values[j] = static_cast<float>(bytes[j]);
  return values;
#endif
}

INLINE float SumOf(const Floats& vector) {
  float lanes[kLanes];
  std::memcpy(lanes, &vector, sizeof(lanes));
  return SumOfLanes(lanes);
}

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
    constexpr int64_t kStep = 4 * kLanes, kAhead = 1024;
    const int8_t* own = codes + row * columns;
    Floats first = {}, second = {}, third = {}, fourth = {};
    int64_t i = 0;
    for (; i + kStep <= columns; i += kStep) {
      __builtin_prefetch(own + i + kAhead);
      AddProduct(x + i, own + i, &first);
      AddProduct(x + i + kLanes, own + i + kLanes, &second);
      AddProduct(x + i + 2 * kLanes, own + i + 2 * kLanes, &third);
      AddProduct(x + i + 3 * kLanes, own + i + 3 * kLanes, &fourth);
    }
    float sum = SumOf((first + second) + (third + fourth));
    for (; i < columns; ++i) sum += x[i] * static_cast<float>(own[i]);
    return scales[row] * sum;
  }
  INLINE static void AddProduct(const float* x, const int8_t* own, Floats* sum) {
    *sum += Load<Floats>(x) * AsFloats(Load<Bytes>(own));
  }
  INLINE void Widen(int64_t row, int64_t first, int64_t count, float* out) const {
    const int8_t* own = codes + row * columns + first;
    const float scale = scales[row];
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const Floats values = AsFloats(Load<Bytes>(own + i)) * scale;
      std::memcpy(out + i, &values, sizeof(values));
    }
    for (; i < count; ++i) out[i] = static_cast<float>(own[i]) * scale;
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
    Floats total = {};
    float rest = 0.0f;
    for (int64_t g = 0; g < groups; ++g, own += bytes, even += bytes, odd += bytes) {
      Floats low[2] = {}, high[2] = {};
      float tail = 0.0f;
      int64_t i = 0;
      for (; i + 2 * kLanes <= bytes; i += 2 * kLanes) {
        __builtin_prefetch(own + i + kAhead);
        for (int64_t k = 0; k < 2; ++k) {
          const int64_t at = i + k * kLanes;
          const auto pairs = Load<Pairs>(own + at);
          low[k] += Load<Floats>(even + at) * AsFloats((Bytes)(pairs & 15) - 8);
          high[k] += Load<Floats>(odd + at) * AsFloats((Bytes)(pairs >> 4) - 8);
        }
      }
      for (; i < bytes; ++i) tail += even[i] * Low(own[i]) + odd[i] * High(own[i]);
      total += scale[g] * ((low[0] + low[1]) + (high[0] + high[1]));
      rest += scale[g] * tail;
    }
    return SumOf(total) + rest;
  }
  INLINE void Widen(int64_t row, int64_t first, int64_t count, float* out) const {
    const int64_t half = columns / 2, bytes = half / groups;
    const int64_t begin = first / 2, end = (first + count) / 2;
    const uint8_t* own = codes + row * half;
    for (int64_t g = begin / bytes; g * bytes < end; ++g) {
      const float scale = scales[row * groups + g];
      const int64_t last = std::min(end, (g + 1) * bytes);
      for (int64_t i = std::max(begin, g * bytes); i < last; ++i) {
        out[2 * (i - begin)] = Low(own[i]) * scale;
        out[2 * (i - begin) + 1] = High(own[i]) * scale;
      }
    }
  }
};

#endif  // MISTRAL_MS_OPS_CPU_MATRICES_H_
