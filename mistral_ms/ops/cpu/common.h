// What the operators share: their results, their threads, their arithmetic.
//
// Entry points are for mindspore.ops.Custom("aot"): parameters are the inputs, then the outputs; a
// result other than zero raises an error in Python.

#ifndef MISTRAL_MS_OPS_CPU_COMMON_H_
#define MISTRAL_MS_OPS_CPU_COMMON_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

// Functions with loops over vectors are compiled for several instruction sets; the processor's best
// is taken when the library is loaded. What they call must be inlined.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define MULTIVERSION
#endif
#define INLINE inline __attribute__((always_inline))

enum Result { kDone = 0, kNoOneDnn = 1, kArguments = 2, kProduct = 3 };

// Whether the parameters have these types: 'f' is float32, 'h' bfloat16, 'i' int32, 'c' int8, 'u'
// uint8, 'b' bool.
inline bool AreOfTypes(const char* types, int parameters, const char** dtypes) {
  if (parameters != static_cast<int>(std::strlen(types))) return false;
  for (int i = 0; i < parameters; ++i) {
    const char* type = types[i] == 'f'   ? "float32"
                       : types[i] == 'h' ? "bfloat16"
                       : types[i] == 'i' ? "int32"
                       : types[i] == 'c' ? "int8"
                       : types[i] == 'u' ? "uint8"
                                         : "bool";
    if (std::strcmp(dtypes[i], type) != 0) return false;
  }
  return true;
}

inline int64_t Elements(int dimensions, const int64_t* shape) {
  int64_t elements = 1;
  for (int i = 0; i < dimensions; ++i) elements *= shape[i];
  return elements;
}

// Calls compute(first, count) for each thread's share of `items`; each share is a multiple of
// `grain` but the last. The threads live as long as one call: that costs some 20 microseconds each,
// and a process may fork at any time.
template <typename Compute>
bool Divide(int64_t items, int64_t grain, Compute compute) {
  const int64_t grains = (items + grain - 1) / grain;
  const int64_t threads =
      std::clamp<int64_t>(grains, 1, std::max(1u, std::thread::hardware_concurrency()));
  std::atomic<bool> failed{false};
  const auto share = [&](int64_t i) {
    const int64_t begin = grains * i / threads * grain;
    const int64_t end = std::min(items, grains * (i + 1) / threads * grain);
    if (compute(begin, end - begin) != 0) failed = true;
  };
  std::vector<std::thread> others;
  others.reserve(threads);
  for (int64_t i = 1; i < threads; ++i) {
    try {
      others.emplace_back(share, i);
    } catch (const std::system_error&) {  // no thread is to be had
      share(i);
    }
  }
  share(0);
  for (auto& thread : others) thread.join();
  return !failed;
}

// oneDNN's product of row-major matrices; nullptr where MindSpore has not loaded oneDNN.
using Sgemm = int (*)(char, char, int64_t, int64_t, int64_t, float, const float*, int64_t,
                      const float*, int64_t, float, float*, int64_t);
Sgemm OneDnn();

constexpr int64_t kColumnsOfThread = 64;
constexpr int64_t kFewRows = 4;

// The columns that a thread takes at least.
inline int64_t GrainOf(int64_t columns, int64_t work, int64_t work_of_thread) {
  if (work == 0) return columns;
  return std::max(kColumnsOfThread, columns * work_of_thread / work);
}

struct Group {
  int64_t first, rows;
};

// Where the rows of each expert lie; the last group is what lies behind them.
inline std::vector<Group> Groups(const void* sizes, int64_t experts, int64_t rows) {
  std::vector<Group> groups;
  int64_t first = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t size = static_cast<const int32_t*>(sizes)[e];
    groups.push_back({first, std::clamp<int64_t>(size, 0, rows - first)});
    first += groups.back().rows;
  }
  groups.push_back({first, rows - first});
  return groups;
}

// Fills some columns of a group's rows with zeros.
inline void Clear(float* matrix, const Group& rows, int64_t width, int64_t column,
                  int64_t columns) {
  for (int64_t r = rows.first; r < rows.first + rows.rows; ++r) {
    std::fill_n(matrix + r * width + column, columns, 0.0f);
  }
}

// A function of the oneDNN that MindSpore has loaded; nullptr where there is none.
void* FindInOneDnn(const char* name);

constexpr int64_t kLanes = 16;

INLINE float SumOfLanes(const float* lanes) {
  float half[kLanes / 2];
  for (int64_t j = 0; j < kLanes / 2; ++j) half[j] = lanes[j] + lanes[j + kLanes / 2];
  float sum = 0.0f;
  for (int64_t j = 0; j < kLanes / 2; ++j) sum += half[j];
  return sum;
}

INLINE float Widened(float x) { return x; }

INLINE float Widened(int8_t x) { return static_cast<float>(x); }

// The value of the bits of a bfloat16: the upper half of a float32.
INLINE float Widened(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// The nearest bfloat16, of two equally near ones the even one; NaN stays NaN.
INLINE uint16_t Rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t nan = (bits >> 16) | 0x40u;
  const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : nearest);
}

// The product of vectors of which `w`, float32, bfloat16 or codes, is read from memory and `x` from the
// cache. Four independent sums and the prefetches are what memory's speed takes.
template <typename W>
INLINE float Dot(const float* x, const W* w, int64_t n) {
  constexpr int64_t kSums = 4, kStep = kSums * kLanes, kAhead = 1024;
  float lanes[kSums][kLanes] = {};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    for (int64_t k = 0; k < kSums; ++k) {
      const int64_t at = i + k * kLanes;
      __builtin_prefetch(w + at + kAhead);
      for (int64_t j = 0; j < kLanes; ++j) lanes[k][j] += x[at + j] * Widened(w[at + j]);
    }
  }
  for (int64_t k = 1; k < kSums; ++k) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[0][j] += lanes[k][j];
  }
  float sum = SumOfLanes(lanes[0]);
  for (; i < n; ++i) sum += x[i] * Widened(w[i]);
  return sum;
}

// e^x to 2 units in the last place; beyond the range of normal numbers the nearest one, NaN for NaN.
INLINE float Exp(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // rounds to an integer in the low bits
  const float n = shifted - 12582912.0f;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + (127u << 23);
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power;
}

INLINE float Sigmoid(float x) { return 1.0f / (1.0f + Exp(-x)); }

#endif  // MISTRAL_MS_OPS_CPU_COMMON_H_
