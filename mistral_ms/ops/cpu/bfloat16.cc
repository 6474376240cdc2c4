// Products with matrices that are bfloat16 in memory, of rows in float32, which are rounded to
// bfloat16 first; the sums are float32.
//
// Of more than a few rows oneDNN multiplies, with the processor's instructions for bfloat16. It has
// no such product on processors without AVX-512: there a thread widens some rows of the matrix at a
// time, and multiplies these in float32, which gives the same but for the order of the sums.

#include "common.h"

namespace {

constexpr int64_t kWorkOfThread = 1 << 18;  // multiplications; fewer are done before a thread begins
constexpr int64_t kWidened = 64;            // rows of the matrix

using Bf16Gemm = int (*)(char, char, int64_t, int64_t, int64_t, float, const uint16_t*, int64_t,
                         const uint16_t*, int64_t, float, float*, int64_t);

Bf16Gemm OneDnnBf16() {
  static const auto gemm = reinterpret_cast<Bf16Gemm>(FindInOneDnn("dnnl_gemm_bf16bf16f32"));
  return gemm;
}

int64_t Grain(int64_t columns, int64_t work) { return GrainOf(columns, work, kWorkOfThread); }

MULTIVERSION void Round(const float* x, uint16_t* bits, float* values, int64_t elements) {
  for (int64_t i = 0; i < elements; ++i) {
    bits[i] = Rounded(x[i]);
    values[i] = Widened(bits[i]);
  }
}

// Rows as bfloat16, and with those values as float32.
struct Rows {
  std::vector<uint16_t> bits;
  std::vector<float> values;

  Rows(const float* x, int64_t elements) : bits(elements), values(elements) {
    Round(x, bits.data(), values.data(), elements);
  }
};

// x [rows, I], w [columns, I] -> y [rows, columns], a row of y being `width` long
MULTIVERSION void FewRows(const float* x, const uint16_t* w, float* y, int64_t rows,
                          int64_t columns, int64_t I, int64_t width) {
  for (int64_t o = 0; o < columns; ++o) {
    for (int64_t r = 0; r < rows; ++r) y[r * width + o] = Dot(x + r * I, w + o * I, I);
  }
}

MULTIVERSION void Widen(const uint16_t* bits, float* values, int64_t elements) {
  for (int64_t i = 0; i < elements; ++i) values[i] = Widened(bits[i]);
}

// The same, of any number of rows, which begin at `first`; not zero: it could not be done.
int Product(const Rows& x, int64_t first, const uint16_t* w, float* y, int64_t rows,
            int64_t columns, int64_t I, int64_t width) {
  if (rows <= kFewRows) {
    FewRows(x.values.data() + first * I, w, y, rows, columns, I, width);
    return 0;
  }
  if (OneDnnBf16() != nullptr && OneDnnBf16()('N', 'T', rows, columns, I, 1.0f,
                                              x.bits.data() + first * I, I, w, I, 0.0f, y,
                                              width) == 0) {
    return 0;
  }
  std::vector<float> wide(std::min(columns, kWidened) * I);
  for (int64_t o = 0; o < columns; o += kWidened) {
    const int64_t count = std::min(columns - o, kWidened);
    Widen(w + o * I, wide.data(), count * I);
    if (OneDnn()('N', 'T', rows, count, I, 1.0f, x.values.data() + first * I, I, wide.data(), I,
                 0.0f, y + o, width)) {
      return 1;
    }
  }
  return 0;
}

// x [R, I], w [E, O, I], the rows of each expert -> y [R, O]
Result Products(const float* x, const uint16_t* w, float* y, const std::vector<Group>& groups,
                int64_t R, int64_t I, int64_t O) {
  const Rows rows(x, R * I);
  const int64_t E = static_cast<int64_t>(groups.size()) - 1;
  const bool done = Divide(O, Grain(O, R * O * I), [&](int64_t column, int64_t columns) {
    for (int64_t e = 0; e < E; ++e) {
      const auto [first, count] = groups[e];
      if (count == 0) continue;
      if (Product(rows, first, w + (e * O + column) * I, y + first * O + column, count, columns, I,
                  O)) {
        return 1;
      }
    }
    Clear(y, groups[E], O, column, columns);
    return 0;
  });
  return done ? kDone : kProduct;
}

}  // namespace

// x [T, I], w [O, I] in bfloat16 -> y [T, O]
extern "C" int Bfloat16Linear(int parameters, void** data, int*, int64_t** shapes,
                              const char** dtypes, void*, void*) {
  if (OneDnn() == nullptr) return kNoOneDnn;
  if (!AreOfTypes("fhf", parameters, dtypes)) return kArguments;
  const int64_t T = shapes[0][0], I = shapes[0][1], O = shapes[1][0];
  if (shapes[1][1] != I) return kArguments;
  return Products(static_cast<const float*>(data[0]), static_cast<const uint16_t*>(data[1]),
                  static_cast<float*>(data[2]), {{0, T}, {T, 0}}, T, I, O);
}

// x [R, I], w [E, O, I] in bfloat16, group sizes [E] -> y [R, O]
extern "C" int Bfloat16GroupedLinear(int parameters, void** data, int*, int64_t** shapes,
                                     const char** dtypes, void*, void*) {
  if (OneDnn() == nullptr) return kNoOneDnn;
  if (!AreOfTypes("fhif", parameters, dtypes)) return kArguments;
  const int64_t R = shapes[0][0], I = shapes[0][1], E = shapes[1][0], O = shapes[1][1];
  if (shapes[1][2] != I || shapes[2][0] != E) return kArguments;
  return Products(static_cast<const float*>(data[0]), static_cast<const uint16_t*>(data[1]),
                  static_cast<float*>(data[3]), Groups(data[2], E, R), R, I, O);
}

// table [V, H] in bfloat16, ids [T] -> rows [T, H]; zeros for an id that the table does not have
extern "C" int Bfloat16Rows(int parameters, void** data, int*, int64_t** shapes,
                            const char** dtypes, void*, void*) {
  if (!AreOfTypes("hif", parameters, dtypes)) return kArguments;
  const int64_t V = shapes[0][0], H = shapes[0][1], T = shapes[1][0];
  const auto* table = static_cast<const uint16_t*>(data[0]);
  const auto* ids = static_cast<const int32_t*>(data[1]);
  auto* rows = static_cast<float*>(data[2]);
  for (int64_t t = 0; t < T; ++t) {
    if (ids[t] < 0 || ids[t] >= V) {
      std::fill_n(rows + t * H, H, 0.0f);
    } else {
      Widen(table + ids[t] * H, rows + t * H, H);
    }
  }
  return kDone;
}
