// Products of rows that are sorted by expert with each expert's matrix, in float32.
//
// oneDNN, which MindSpore has loaded, multiplies: one product per expert, on exactly its rows.
// Rows behind the last group give zero. Group sizes below zero count as zero, and groups end where
// the rows end, so no size can lead out of a buffer.
//
// MindSpore's oneDNN computes in the thread that calls it. So the columns of the result are divided
// among threads, each of which calls it for its columns of all experts: an equal share, however the
// rows are distributed. The threads live as long as one call: that costs some 20 microseconds each,
// and a process may fork at any time.
//
// A few rows are multiplied here, one dot product for each element of the result: that takes the time
// that reading the matrices takes.

#include <dlfcn.h>

#include "common.h"

namespace {

constexpr int64_t kWorkOfThread = 1 << 18;  // multiplications; fewer are done before a thread begins

// The types are those of three inputs and one output; and there is a oneDNN.
Result Check(int parameters, const char** dtypes, const char* types) {
  if (OneDnn() == nullptr) return kNoOneDnn;
  return AreOfTypes(types, parameters, dtypes) ? kDone : kArguments;
}

// The columns that a thread takes at least.
int64_t Grain(int64_t columns, int64_t work) { return GrainOf(columns, work, kWorkOfThread); }

// x [rows, I], w [columns, I] -> y [rows, columns], a row of y being `width` long
MULTIVERSION void FewRows(const float* x, const float* w, float* y, int64_t rows, int64_t columns,
                          int64_t I, int64_t width) {
  for (int64_t o = 0; o < columns; ++o) {
    for (int64_t r = 0; r < rows; ++r) y[r * width + o] = Dot(x + r * I, w + o * I, I);
  }
}

}  // namespace

void* FindInOneDnn(const char* name) {
  for (const char* file : {"libdnnl.so.3", "libdnnl.so.2"}) {
    if (void* library = dlopen(file, RTLD_NOLOAD | RTLD_NOW)) {
      if (void* symbol = dlsym(library, name)) return symbol;
    }
  }
  return nullptr;
}

Sgemm OneDnn() {
  static const Sgemm sgemm = reinterpret_cast<Sgemm>(FindInOneDnn("dnnl_sgemm"));
  return sgemm;
}

// x [T, I] of a few rows, w [O, I] -> y [T, O]
extern "C" int FewRowsLinear(int parameters, void** data, int*, int64_t** shapes,
                             const char** dtypes, void*, void*) {
  if (!AreOfTypes("fff", parameters, dtypes)) return kArguments;
  const int64_t T = shapes[0][0], I = shapes[0][1], O = shapes[1][0];
  if (shapes[1][1] != I) return kArguments;
  const auto* x = static_cast<const float*>(data[0]);
  const auto* w = static_cast<const float*>(data[1]);
  auto* y = static_cast<float*>(data[2]);
  Divide(O, Grain(O, T * O * I), [&](int64_t column, int64_t columns) {
    FewRows(x, w + column * I, y + column, T, columns, I, O);
    return 0;
  });
  return kDone;
}

// x [R, I], w [E, O, I], group sizes [E] -> y [R, O]
extern "C" int GroupedLinear(int parameters, void** data, int*, int64_t** shapes,
                             const char** dtypes, void*, void*) {
  if (const Result wrong = Check(parameters, dtypes, "ffif")) return wrong;
  const int64_t R = shapes[0][0], I = shapes[0][1], E = shapes[1][0], O = shapes[1][1];
  if (shapes[1][2] != I || shapes[2][0] != E) return kArguments;
  const auto* x = static_cast<const float*>(data[0]);
  const auto* w = static_cast<const float*>(data[1]);
  auto* y = static_cast<float*>(data[3]);
  const auto groups = Groups(data[2], E, R);
  const bool done = Divide(O, Grain(O, R * O * I), [&](int64_t column, int64_t columns) {
    for (int64_t e = 0; e < E; ++e) {
      const auto [first, rows] = groups[e];
      if (rows == 0) continue;
      const float* own_w = w + (e * O + column) * I;
      float* own_y = y + first * O + column;
      if (rows <= kFewRows) {
        FewRows(x + first * I, own_w, own_y, rows, columns, I, O);
      } else if (OneDnn()('N', 'T', rows, columns, I, 1.0f, x + first * I, I, own_w, I, 0.0f, own_y,
                          O)) {
        return 1;
      }
    }
    Clear(y, groups[E], O, column, columns);
    return 0;
  });
  return done ? kDone : kProduct;
}

// dy [R, O], w [E, O, I], group sizes [E] -> dx [R, I]
extern "C" int GroupedLinearInputGradient(int parameters, void** data, int*, int64_t** shapes,
                                          const char** dtypes, void*, void*) {
  if (const Result wrong = Check(parameters, dtypes, "ffif")) return wrong;
  const int64_t R = shapes[0][0], O = shapes[0][1], E = shapes[1][0], I = shapes[1][2];
  if (shapes[1][1] != O || shapes[2][0] != E) return kArguments;
  const auto* dy = static_cast<const float*>(data[0]);
  const auto* w = static_cast<const float*>(data[1]);
  auto* dx = static_cast<float*>(data[3]);
  const auto groups = Groups(data[2], E, R);
  const bool done = Divide(I, Grain(I, R * O * I), [&](int64_t column, int64_t columns) {
    for (int64_t e = 0; e < E; ++e) {
      const auto [first, rows] = groups[e];
      if (rows == 0) continue;
      if (OneDnn()('N', 'N', rows, columns, O, 1.0f, dy + first * O, O, w + e * O * I + column, I,
                   0.0f, dx + first * I + column, I)) {
        return 1;
      }
    }
    Clear(dx, groups[E], I, column, columns);
    return 0;
  });
  return done ? kDone : kProduct;
}

// dy [R, O], x [R, I], group sizes [E] -> dw [E, O, I]
extern "C" int GroupedLinearWeightGradient(int parameters, void** data, int*, int64_t** shapes,
                                           const char** dtypes, void*, void*) {
  if (const Result wrong = Check(parameters, dtypes, "ffif")) return wrong;
  const int64_t R = shapes[0][0], O = shapes[0][1], I = shapes[1][1], E = shapes[2][0];
  if (shapes[1][0] != R) return kArguments;
  const auto* dy = static_cast<const float*>(data[0]);
  const auto* x = static_cast<const float*>(data[1]);
  auto* dw = static_cast<float*>(data[3]);
  const auto groups = Groups(data[2], E, R);
  // an expert's matrix is divided by rows: O of them
  const bool done = Divide(O, Grain(O, R * O * I), [&](int64_t column, int64_t columns) {
    for (int64_t e = 0; e < E; ++e) {
      const auto [first, rows] = groups[e];
      float* part = dw + (e * O + column) * I;
      if (rows == 0) {
        std::fill_n(part, columns * I, 0.0f);
      } else if (OneDnn()('T', 'N', columns, I, rows, 1.0f, dy + first * O + column, O,
                          x + first * I, I, 0.0f, part, I)) {
        return 1;
      }
    }
    return 0;
  });
  return done ? kDone : kProduct;
}
