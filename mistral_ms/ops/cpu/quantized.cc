// Products of rows that are sorted by expert with matrices of codes and scales.
//
// A few rows are multiplied with the codes, and the sum of a group with its scale. For more a thread
// widens some rows of the matrix at a time, and oneDNN multiplies with these in float32. So it does
// for the gradient of the rows, with the columns of the matrix that are the thread's.

#include "matrices.h"

namespace {

constexpr int64_t kWorkOfThread = 1 << 18;  // multiplications; fewer are done before a thread begins
constexpr int64_t kWidened = 256;           // rows of the matrix

// x [rows, columns of the matrix], arranged -> columns of y [rows, width]
#define FOR_MATRICES(M)                                                                        \
  MULTIVERSION void FewRows(const float* x, const M& w, float* y, int64_t rows, int64_t count, \
                            int64_t width) {                                                   \
    for (int64_t o = 0; o < count; ++o) {                                                      \
      for (int64_t r = 0; r < rows; ++r) y[r * width + o] = w.Times(o, x + r * w.columns);     \
    }                                                                                          \
  }                                                                                            \
  MULTIVERSION void Widen(const M& w, int64_t first, int64_t count, float* out) {              \
    for (int64_t o = 0; o < count; ++o) w.Widen(first + o, 0, w.columns, out + o * w.columns); \
  }                                                                                            \
  MULTIVERSION void WidenColumns(const M& w, int64_t first, int64_t count, int64_t column,     \
                                 int64_t columns, float* out) {                                \
    for (int64_t o = 0; o < count; ++o) w.Widen(first + o, column, columns, out + o * columns); \
  }

FOR_MATRICES(Int8)
FOR_MATRICES(Int4)

// x [R, I], w of all experts, the rows of each -> y [R, O]
template <typename M>
Result Products(const float* x, const M& w, float* y, const std::vector<Group>& groups, int64_t R,
                int64_t O) {
  const int64_t I = w.columns, E = static_cast<int64_t>(groups.size()) - 1;
  std::vector<float> arranged(R * I);
  for (int64_t e = 0; e < E; ++e) {
    const auto [first, rows] = groups[e];
    for (int64_t r = first; rows <= kFewRows && r < first + rows; ++r) {
      w.Arrange(x + r * I, arranged.data() + r * I);
    }
  }
  const int64_t grain = GrainOf(O, R * O * I, kWorkOfThread);
  const bool done = Divide(O, grain, [&](int64_t column, int64_t columns) {
    std::vector<float> wide(std::min(columns, kWidened) * I);
    for (int64_t e = 0; e < E; ++e) {
      const auto [first, rows] = groups[e];
      if (rows == 0) continue;
      const M own = w.From(e * O + column);
      float* own_y = y + first * O + column;
      if (rows <= kFewRows) {
        FewRows(arranged.data() + first * I, own, own_y, rows, columns, O);
        continue;
      }
      for (int64_t o = 0; o < columns; o += kWidened) {
        const int64_t count = std::min(columns - o, kWidened);
        Widen(own, o, count, wide.data());
        if (OneDnn()('N', 'T', rows, count, I, 1.0f, x + first * I, I, wide.data(), I, 0.0f,
                     own_y + o, O)) {
          return 1;
        }
      }
    }
    Clear(y, groups[E], O, column, columns);
    return 0;
  });
  return done ? kDone : kProduct;
}

// dy [R, O], w of all experts, the rows of each -> columns of dx [R, I]
template <typename M>
Result InputGradients(const float* dy, const M& w, float* dx, const std::vector<Group>& groups,
                      int64_t R, int64_t O) {
  const int64_t I = w.columns, E = static_cast<int64_t>(groups.size()) - 1;
  // an even number: two columns share a byte
  const int64_t grain = (GrainOf(I, R * O * I, kWorkOfThread) + 1) / 2 * 2;
  const bool done = Divide(I, grain, [&](int64_t column, int64_t columns) {
    std::vector<float> wide(std::min(O, kWidened) * columns);
    for (int64_t e = 0; e < E; ++e) {
      const auto [first, rows] = groups[e];
      if (rows == 0) continue;
      const M own = w.From(e * O);
      for (int64_t o = 0; o < O; o += kWidened) {
        const int64_t count = std::min(O - o, kWidened);
        WidenColumns(own, o, count, column, columns, wide.data());
        if (OneDnn()('N', 'N', rows, columns, count, 1.0f, dy + first * O + o, O, wide.data(),
                     columns, o == 0 ? 0.0f : 1.0f, dx + first * I + column, I)) {
          return 1;
        }
      }
    }
    Clear(dx, groups[E], I, column, columns);
    return 0;
  });
  return done ? kDone : kProduct;
}

template <typename M>
int Multiply(void** data, int64_t** shapes, int64_t packed) {
  const int64_t R = shapes[0][0], I = shapes[0][1], E = shapes[1][0], O = shapes[1][1];
  if (shapes[1][2] * packed != I || !AreScales(shapes[2], E, O, I, packed) || shapes[3][0] != E) {
    return kArguments;
  }
  const M w(data[1], static_cast<const float*>(data[2]), I, shapes[2][2]);
  return Products(static_cast<const float*>(data[0]), w, static_cast<float*>(data[4]),
                  Groups(data[3], E, R), R, O);
}

template <typename M>
int Gradient(void** data, int64_t** shapes, int64_t packed) {
  const int64_t R = shapes[0][0], O = shapes[0][1], E = shapes[1][0], I = shapes[1][2] * packed;
  if (shapes[1][1] != O || !AreScales(shapes[2], E, O, I, packed) || shapes[3][0] != E) {
    return kArguments;
  }
  const M w(data[1], static_cast<const float*>(data[2]), I, shapes[2][2]);
  return InputGradients(static_cast<const float*>(data[0]), w, static_cast<float*>(data[4]),
                        Groups(data[3], E, R), R, O);
}

}  // namespace

// x [R, I], codes [E, O, I], scales [E, O, 1], group sizes [E] -> y [R, O]
extern "C" int Int8GroupedLinear(int parameters, void** data, int*, int64_t** shapes,
                                 const char** dtypes, void*, void*) {
  if (OneDnn() == nullptr) return kNoOneDnn;
  if (!AreOfTypes("fcfif", parameters, dtypes)) return kArguments;
  return Multiply<Int8>(data, shapes, 1);
}

// x [R, I], codes [E, O, I / 2], scales [E, O, groups], group sizes [E] -> y [R, O]
extern "C" int Int4GroupedLinear(int parameters, void** data, int*, int64_t** shapes,
                                 const char** dtypes, void*, void*) {
  if (OneDnn() == nullptr) return kNoOneDnn;
  if (!AreOfTypes("fufif", parameters, dtypes)) return kArguments;
  return Multiply<Int4>(data, shapes, 2);
}

// dy [R, O], codes [E, O, I], scales [E, O, 1], group sizes [E] -> dx [R, I]
extern "C" int Int8GroupedLinearInputGradient(int parameters, void** data, int*, int64_t** shapes,
                                              const char** dtypes, void*, void*) {
  if (OneDnn() == nullptr) return kNoOneDnn;
  if (!AreOfTypes("fcfif", parameters, dtypes)) return kArguments;
  return Gradient<Int8>(data, shapes, 1);
}

// dy [R, O], codes [E, O, I / 2], scales [E, O, groups], group sizes [E] -> dx [R, I]
extern "C" int Int4GroupedLinearInputGradient(int parameters, void** data, int*, int64_t** shapes,
                                              const char** dtypes, void*, void*) {
  if (OneDnn() == nullptr) return kNoOneDnn;
  if (!AreOfTypes("fufif", parameters, dtypes)) return kArguments;
  return Gradient<Int4>(data, shapes, 2);
}
