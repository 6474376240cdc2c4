// SwiGLU of separate inputs, in one pass over memory.

#include "common.h"

namespace {

constexpr int64_t kGrain = 1 << 15;

MULTIVERSION void Forward(const float* gate, const float* up, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = gate[i] * Sigmoid(gate[i]) * up[i];
}

MULTIVERSION void Backward(const float* gate, const float* up, const float* dy, float* dgate,
                           float* dup, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = gate[i], s = Sigmoid(g), d = dy[i];
    dgate[i] = d * up[i] * (s + g * s * (1.0f - s));
    dup[i] = d * g * s;
  }
}

}  // namespace

// gate, up -> silu(gate) * up, all of one shape
extern "C" int SwiGLU(int parameters, void** data, int* dimensions, int64_t** shapes,
                      const char** dtypes, void*, void*) {
  if (!AreOfTypes("fff", parameters, dtypes)) return kArguments;
  const int64_t elements = Elements(dimensions[0], shapes[0]);
  if (Elements(dimensions[1], shapes[1]) != elements) return kArguments;
  const auto* gate = static_cast<const float*>(data[0]);
  const auto* up = static_cast<const float*>(data[1]);
  auto* y = static_cast<float*>(data[2]);
  Divide(elements, kGrain, [&](int64_t first, int64_t count) {
    Forward(gate + first, up + first, y + first, count);
    return 0;
  });
  return kDone;
}

// gate, up, dy -> dgate, dup
extern "C" int SwiGLUGradient(int parameters, void** data, int* dimensions, int64_t** shapes,
                              const char** dtypes, void*, void*) {
  if (!AreOfTypes("fffff", parameters, dtypes)) return kArguments;
  const int64_t elements = Elements(dimensions[0], shapes[0]);
  for (int i : {1, 2}) {
    if (Elements(dimensions[i], shapes[i]) != elements) return kArguments;
  }
  const auto* gate = static_cast<const float*>(data[0]);
  const auto* up = static_cast<const float*>(data[1]);
  const auto* dy = static_cast<const float*>(data[2]);
  auto* dgate = static_cast<float*>(data[3]);
  auto* dup = static_cast<float*>(data[4]);
  Divide(elements, kGrain, [&](int64_t first, int64_t count) {
    Backward(gate + first, up + first, dy + first, dgate + first, dup + first, count);
    return 0;
  });
  return kDone;
}
