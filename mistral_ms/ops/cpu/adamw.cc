// What an optimizer does with a gradient, in one pass over memory each: its sum of squares, and an
// update of AdamW that clips.

#include <cmath>

#include "common.h"

namespace {

constexpr int64_t kGrain = 1 << 15;

MULTIVERSION double SumOfSquares(const float* x, int64_t n) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += static_cast<double>(x[i + j]) * x[i + j];
  }
  double sum = 0.0;
  for (double lane : lanes) sum += lane;
  for (; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
  return sum;
}

struct Numbers {
  float scale, rate, eps, decay, beta1, beta2;
};

MULTIVERSION void Update(float* w, float* mean, float* square, const float* gradient,
                         const Numbers& numbers, int64_t n) {
  const auto [scale, rate, eps, decay, beta1, beta2] = numbers;
  const float keep = 1.0f - decay, new1 = 1.0f - beta1, new2 = 1.0f - beta2;
  for (int64_t i = 0; i < n; ++i) {
    const float g = gradient[i] * scale;
    const float m = mean[i] + (g - mean[i]) * new1;
    const float v = square[i] + (g * g - square[i]) * new2;
    mean[i] = m;
    square[i] = v;
    w[i] = w[i] * keep - rate * m / (std::sqrt(v) + eps);
  }
}

}  // namespace

// x -> sum of x^2 [1], added up in double precision; the same whatever the number of threads
extern "C" int SumOfSquares(int parameters, void** data, int* dimensions, int64_t** shapes,
                            const char** dtypes, void*, void*) {
  if (!AreOfTypes("ff", parameters, dtypes)) return kArguments;
  const int64_t elements = Elements(dimensions[0], shapes[0]);
  const auto* x = static_cast<const float*>(data[0]);
  std::vector<double> terms((elements + kGrain - 1) / kGrain);
  Divide(elements, kGrain, [&](int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; i += kGrain) {
      terms[i / kGrain] = SumOfSquares(x + i, std::min(kGrain, elements - i));
    }
    return 0;
  });
  double sum = 0.0;
  for (double term : terms) sum += term;
  *static_cast<float*>(data[1]) = static_cast<float>(sum);
  return kDone;
}

// weight, mean, mean of squares (all three updated in place), gradient; one number each: the
// gradient's scale, rate, eps, decay, beta1, beta2 -> [1], something that is there when the update is
extern "C" int AdamW(int parameters, void** data, int* dimensions, int64_t** shapes,
                     const char** dtypes, void*, void*) {
  if (!AreOfTypes("fffffffffff", parameters, dtypes)) return kArguments;
  const int64_t elements = Elements(dimensions[0], shapes[0]);
  for (int i : {1, 2, 3}) {
    if (Elements(dimensions[i], shapes[i]) != elements) return kArguments;
  }
  auto* w = static_cast<float*>(data[0]);
  auto* mean = static_cast<float*>(data[1]);
  auto* square = static_cast<float*>(data[2]);
  const auto* gradient = static_cast<const float*>(data[3]);
  const auto number = [&](int i) { return *static_cast<const float*>(data[i]); };
  const Numbers numbers{number(4), number(5), number(6), number(7), number(8), number(9)};
  Divide(elements, kGrain, [&](int64_t first, int64_t count) {
    Update(w + first, mean + first, square + first, gradient + first, numbers, count);
    return 0;
  });
  *static_cast<float*>(data[10]) = 0.0f;
  return kDone;
}
