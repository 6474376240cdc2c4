// RMSNorm in one pass over memory.

#include <cmath>

#include "common.h"

namespace {

constexpr int64_t kElementsOfThread = 1 << 15;
constexpr int64_t kRowsOfSum = 64;  // so many rows are one term of the weight's gradient

INLINE float InverseRms(const float* x, int64_t H, float eps) {
  return 1.0f / std::sqrt(Dot(x, x, H) / static_cast<float>(H) + eps);
}

MULTIVERSION void Forward(const float* x, const float* w, float eps, float* y, int64_t rows,
                          int64_t H) {
  for (int64_t r = 0; r < rows; ++r, x += H, y += H) {
    const float inverse = InverseRms(x, H, eps);
    for (int64_t h = 0; h < H; ++h) y[h] = x[h] * inverse * w[h];
  }
}

// Adds these rows' part of the weight's gradient to dw.
MULTIVERSION void Backward(const float* dy, const float* x, const float* w, float eps, float* dx,
                           float* dw, int64_t rows, int64_t H) {
  for (int64_t r = 0; r < rows; ++r, x += H, dy += H, dx += H) {
    const float inverse = InverseRms(x, H, eps);
    for (int64_t h = 0; h < H; ++h) dx[h] = dy[h] * w[h];
    const float mean = Dot(dx, x, H) / static_cast<float>(H) * inverse * inverse;
    for (int64_t h = 0; h < H; ++h) {
      dw[h] += dy[h] * (x[h] * inverse);
      dx[h] = inverse * (dx[h] - x[h] * mean);
    }
  }
}

}  // namespace

// x [..., H], weight [H], eps [1] -> y [..., H]
extern "C" int RmsNorm(int parameters, void** data, int* dimensions, int64_t** shapes,
                       const char** dtypes, void*, void*) {
  if (!AreOfTypes("ffff", parameters, dtypes)) return kArguments;
  const int64_t elements = Elements(dimensions[0], shapes[0]), H = shapes[1][0];
  if (shapes[0][dimensions[0] - 1] != H) return kArguments;
  const int64_t T = elements / H;
  const auto* x = static_cast<const float*>(data[0]);
  const auto* w = static_cast<const float*>(data[1]);
  const float eps = *static_cast<const float*>(data[2]);
  auto* y = static_cast<float*>(data[3]);
  Divide(T, kElementsOfThread / H + 1, [&](int64_t first, int64_t rows) {
    Forward(x + first * H, w, eps, y + first * H, rows, H);
    return 0;
  });
  return kDone;
}

// dy and x [..., H], weight [H], eps [1] -> dx [..., H], dweight [H]
extern "C" int RmsNormGradient(int parameters, void** data, int* dimensions, int64_t** shapes,
                               const char** dtypes, void*, void*) {
  if (!AreOfTypes("ffffff", parameters, dtypes)) return kArguments;
  const int64_t elements = Elements(dimensions[0], shapes[0]), H = shapes[2][0];
  if (shapes[0][dimensions[0] - 1] != H) return kArguments;
  if (Elements(dimensions[1], shapes[1]) != elements) return kArguments;
  const int64_t T = elements / H;
  const auto* dy = static_cast<const float*>(data[0]);
  const auto* x = static_cast<const float*>(data[1]);
  const auto* w = static_cast<const float*>(data[2]);
  const float eps = *static_cast<const float*>(data[3]);
  auto* dx = static_cast<float*>(data[4]);
  auto* dw = static_cast<float*>(data[5]);
  // terms of the sum are the same and added up in the same order whatever the number of threads
  const int64_t terms = (T + kRowsOfSum - 1) / kRowsOfSum;
  std::vector<float> sums(terms * H, 0.0f);
  Divide(terms, kElementsOfThread / (kRowsOfSum * H) + 1, [&](int64_t first, int64_t count) {
    for (int64_t term = first; term < first + count; ++term) {
      const int64_t row = term * kRowsOfSum, rows = std::min(kRowsOfSum, T - row);
      Backward(dy + row * H, x + row * H, w, eps, dx + row * H, &sums[term * H], rows, H);
    }
    return 0;
  });
  std::fill_n(dw, H, 0.0f);
  for (int64_t term = 0; term < terms; ++term) {
    for (int64_t h = 0; h < H; ++h) dw[h] += sums[term * H + h];
  }
  return kDone;
}
