// Products of rows that are sorted by expert with each expert's matrix, in float32.
//
// oneDNN, which MindSpore has loaded, multiplies: one product per expert, on exactly its rows.
// Rows behind the last group give zero. Group sizes below zero count as zero, and groups end where
// the rows end, so no size can lead out of a buffer.
//
// Entry points for mindspore.ops.Custom("aot"): parameters are the inputs, then the output; a
// result other than zero raises an error in Python.

#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

enum Result { kDone = 0, kNoOneDnn = 1, kArguments = 2, kProduct = 3 };

using Sgemm = int (*)(char, char, int64_t, int64_t, int64_t, float, const float*, int64_t,
                      const float*, int64_t, float, float*, int64_t);

Sgemm FindSgemm() {
  for (const char* name : {"libdnnl.so.3", "libdnnl.so.2"}) {
    if (void* library = dlopen(name, RTLD_NOLOAD | RTLD_NOW)) {
      if (void* symbol = dlsym(library, "dnnl_sgemm")) return reinterpret_cast<Sgemm>(symbol);
    }
  }
  return nullptr;
}

// The types are those of three inputs and one output, with the group sizes in the place `sizes`;
// and there is a oneDNN.
Result Check(Sgemm sgemm, int parameters, const char** dtypes, int sizes) {
  if (sgemm == nullptr) return kNoOneDnn;
  if (parameters != 4) return kArguments;
  for (int i = 0; i < 4; ++i) {
    if (std::strcmp(dtypes[i], i == sizes ? "int32" : "float32") != 0) return kArguments;
  }
  return kDone;
}

Sgemm OneDnn() {
  static const Sgemm sgemm = FindSgemm();
  return sgemm;
}

// Calls product(expert, first row, rows) for every expert; `end` becomes the first row behind them.
template <typename Product>
Result ForEachGroup(const int32_t* sizes, int64_t experts, int64_t rows, int64_t* end,
                    Product product) {
  *end = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t count = std::clamp<int64_t>(sizes[e], 0, rows - *end);
    if (product(e, *end, count) != 0) return kProduct;
    *end += count;
  }
  return kDone;
}

}  // namespace

// x [R, I], w [E, O, I], group sizes [E] -> y [R, O]
extern "C" int GroupedLinear(int parameters, void** data, int*, int64_t** shapes,
                             const char** dtypes, void*, void*) {
  const Sgemm sgemm = OneDnn();
  if (const Result wrong = Check(sgemm, parameters, dtypes, 2)) return wrong;
  const auto* x = static_cast<const float*>(data[0]);
  const auto* w = static_cast<const float*>(data[1]);
  auto* y = static_cast<float*>(data[3]);
  const int64_t R = shapes[0][0], I = shapes[0][1], E = shapes[1][0], O = shapes[1][1];
  if (shapes[1][2] != I || shapes[2][0] != E) return kArguments;
  int64_t end = 0;
  const auto product = [&](int64_t e, int64_t first, int64_t count) {
    if (count == 0) return 0;
    return sgemm('N', 'T', count, O, I, 1.0f, x + first * I, I, w + e * O * I, I, 0.0f,
                 y + first * O, O);
  };
  const auto* sizes = static_cast<const int32_t*>(data[2]);
  if (const Result wrong = ForEachGroup(sizes, E, R, &end, product)) return wrong;
  std::fill(y + end * O, y + R * O, 0.0f);
  return kDone;
}

// dy [R, O], w [E, O, I], group sizes [E] -> dx [R, I]
extern "C" int GroupedLinearInputGradient(int parameters, void** data, int*, int64_t** shapes,
                                          const char** dtypes, void*, void*) {
  const Sgemm sgemm = OneDnn();
  if (const Result wrong = Check(sgemm, parameters, dtypes, 2)) return wrong;
  const auto* dy = static_cast<const float*>(data[0]);
  const auto* w = static_cast<const float*>(data[1]);
  auto* dx = static_cast<float*>(data[3]);
  const int64_t R = shapes[0][0], O = shapes[0][1], E = shapes[1][0], I = shapes[1][2];
  if (shapes[1][1] != O || shapes[2][0] != E) return kArguments;
  int64_t end = 0;
  const auto product = [&](int64_t e, int64_t first, int64_t count) {
    if (count == 0) return 0;
    return sgemm('N', 'N', count, I, O, 1.0f, dy + first * O, O, w + e * O * I, I, 0.0f,
                 dx + first * I, I);
  };
  const auto* sizes = static_cast<const int32_t*>(data[2]);
  if (const Result wrong = ForEachGroup(sizes, E, R, &end, product)) return wrong;
  std::fill(dx + end * I, dx + R * I, 0.0f);
  return kDone;
}

// dy [R, O], x [R, I], group sizes [E] -> dw [E, O, I]
extern "C" int GroupedLinearWeightGradient(int parameters, void** data, int*, int64_t** shapes,
                                           const char** dtypes, void*, void*) {
  const Sgemm sgemm = OneDnn();
  if (const Result wrong = Check(sgemm, parameters, dtypes, 2)) return wrong;
  const auto* dy = static_cast<const float*>(data[0]);
  const auto* x = static_cast<const float*>(data[1]);
  auto* dw = static_cast<float*>(data[3]);
  const int64_t R = shapes[0][0], O = shapes[0][1], I = shapes[1][1], E = shapes[2][0];
  if (shapes[1][0] != R) return kArguments;
  int64_t end = 0;
  const auto product = [&](int64_t e, int64_t first, int64_t count) {
    if (count == 0) {
      std::fill(dw + e * O * I, dw + (e + 1) * O * I, 0.0f);
      return 0;
    }
    return sgemm('T', 'N', O, I, count, 1.0f, dy + first * O, O, x + first * I, I, 0.0f,
                 dw + e * O * I, I);
  };
  const auto* sizes = static_cast<const int32_t*>(data[2]);
  return ForEachGroup(sizes, E, R, &end, product);
}
