// All experts of a few tokens, as in decoding: the chosen experts' matrices are read once, in place.

#include "matrices.h"

namespace {

constexpr int64_t kWorkOfThread = 1 << 17;  // multiplications

// One choice of a token.
struct Choice {
  int64_t token, number;
};

using Choices = std::vector<Choice>;

template <typename M>
INLINE void GateAndUpOf(const Choices& choices, const float* x, const M& w1, const M& w3,
                        float* hidden, int64_t first, int64_t rows, int64_t H, int64_t I) {
  for (int64_t i = first; i < first + rows; ++i) {
    for (const Choice& choice : choices) {
      const float* own_x = x + choice.token * H;
      const float gate = w1.Times(i, own_x), up = w3.Times(i, own_x);
      hidden[choice.number * I + i] = gate * Sigmoid(gate) * up;
    }
  }
}

template <typename M>
INLINE void DownOf(const Choices& choices, const float* hidden, const M& w2, float* out,
                   int64_t first, int64_t rows, int64_t H, int64_t I) {
  for (int64_t h = first; h < first + rows; ++h) {
    for (const Choice& choice : choices) {
      out[choice.number * H + h] = w2.Times(h, hidden + choice.number * I);
    }
  }
}

// GateAndUp: hidden[choice, i] = silu(w1[i] x) * (w3[i] x) of rows i of one expert's matrices
// Down: out[choice, h] = w2[h] hidden[choice] of rows h of one expert's matrix
#define FOR_MATRICES(M)                                                                           \
  MULTIVERSION void GateAndUp(const Choices& choices, const float* x, const M& w1, const M& w3,   \
                              float* hidden, int64_t first, int64_t rows, int64_t H, int64_t I) { \
    GateAndUpOf(choices, x, w1, w3, hidden, first, rows, H, I);                                   \
  }                                                                                               \
  MULTIVERSION void Down(const Choices& choices, const float* hidden, const M& w2, float* out,    \
                         int64_t first, int64_t rows, int64_t H, int64_t I) {                     \
    DownOf(choices, hidden, w2, out, first, rows, H, I);                                          \
  }

FOR_MATRICES(Float32)
FOR_MATRICES(Bfloat16)
FOR_MATRICES(Int8)
FOR_MATRICES(Int4)

template <typename M>
std::vector<float> Arranged(const float* rows, int64_t number, const M& matrix) {
  std::vector<float> out(number * matrix.columns);
  for (int64_t r = 0; r < number; ++r) {
    matrix.Arrange(rows + r * matrix.columns, out.data() + r * matrix.columns);
  }
  return out;
}

int64_t Grain(int64_t rows, int64_t work) { return std::max<int64_t>(16, rows * kWorkOfThread / work); }

struct Sizes {
  int64_t T, H, K, E, I;
};

// The sizes, by the shapes of x, experts, weights and valid; E and I are those of the matrices.
bool AreTokens(int64_t** shapes, const Sizes& sizes) {
  return shapes[1][0] == sizes.T && shapes[2][0] == sizes.T && shapes[2][1] == sizes.K &&
         shapes[3][0] == sizes.T;
}

bool IsMatrix(const int64_t* shape, int64_t E, int64_t rows, int64_t columns) {
  return shape[0] == E && shape[1] == rows && shape[2] == columns;
}

// See FusedExperts; the matrices of all experts stand one behind the other.
template <typename M>
int Compute(void** data, const Sizes& sizes, const M& w1, const M& w3, const M& w2, float* y) {
  const auto [T, H, K, E, I] = sizes;
  const auto* experts = static_cast<const int32_t*>(data[1]);
  const auto* weights = static_cast<const float*>(data[2]);
  const auto* valid = static_cast<const float*>(data[3]);
  std::vector<Choices> choices(E);
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t number = t * K; valid[t] > 0.0f && number < (t + 1) * K; ++number) {
      if (experts[number] < 0 || experts[number] > E) return kArguments;
      if (experts[number] == E) continue;  // a choice that the gate left out
      choices[experts[number]].push_back({t, number});
    }
  }
  const auto x = Arranged(static_cast<const float*>(data[0]), T, w1);
  std::vector<float> hidden(T * K * I), out(T * K * H);
  Divide(I, Grain(I, 2 * T * K * I * H), [&, E = E, H = H, I = I](int64_t first, int64_t rows) {
    for (int64_t e = 0; e < E; ++e) {
      if (choices[e].empty()) continue;
      GateAndUp(choices[e], x.data(), w1.From(e * I), w3.From(e * I), hidden.data(), first, rows, H,
                I);
    }
    return 0;
  });
  hidden = Arranged(hidden.data(), T * K, w2);
  Divide(H, Grain(H, T * K * I * H), [&, T = T, H = H, K = K, E = E, I = I](int64_t first, int64_t rows) {
    for (int64_t e = 0; e < E; ++e) {
      if (!choices[e].empty()) {
        Down(choices[e], hidden.data(), w2.From(e * H), out.data(), first, rows, H, I);
      }
    }
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t h = first; h < first + rows; ++h) {
        float sum = 0.0f;
        for (int64_t k = t * K; valid[t] > 0.0f && k < (t + 1) * K; ++k) {
          sum += weights[k] * out[k * H + h];
        }
        y[t * H + h] = sum;
      }
    }
    return 0;
  });
  return kDone;
}

// Of matrices whose numbers lie one beside the other.
template <typename W>
int ComputePlain(void** data, int64_t** shapes) {
  const Sizes sizes{shapes[0][0], shapes[0][1], shapes[1][1], shapes[4][0], shapes[4][1]};
  const auto [T, H, K, E, I] = sizes;
  if (!AreTokens(shapes, sizes) || !IsMatrix(shapes[4], E, I, H) || !IsMatrix(shapes[5], E, I, H) ||
      !IsMatrix(shapes[6], E, H, I)) {
    return kArguments;
  }
  const auto matrix = [&](int i, int64_t columns) {
    return Plain<W>{static_cast<const W*>(data[i]), columns};
  };
  return Compute(data, sizes, matrix(4, H), matrix(5, H), matrix(6, I),
                 static_cast<float*>(data[7]));
}

// Of codes, each followed by its scales; a byte has `packed` codes.
template <typename M>
int ComputeScaled(void** data, int64_t** shapes, int64_t packed) {
  const Sizes sizes{shapes[0][0], shapes[0][1], shapes[1][1], shapes[4][0], shapes[4][1]};
  const auto [T, H, K, E, I] = sizes;
  if (!AreTokens(shapes, sizes)) return kArguments;
  const int64_t rows[] = {I, I, H}, columns[] = {H, H, I};
  for (int i = 0; i < 3; ++i) {
    const int64_t *codes = shapes[4 + 2 * i], *scales = shapes[5 + 2 * i];
    if (!IsMatrix(codes, E, rows[i], columns[i] / packed) || columns[i] % packed ||
        !AreScales(scales, E, rows[i], columns[i], packed)) {
      return kArguments;
    }
  }
  const auto matrix = [&](int i) {
    return M(data[4 + 2 * i], static_cast<const float*>(data[5 + 2 * i]), columns[i],
             shapes[5 + 2 * i][2]);
  };
  return Compute(data, sizes, matrix(0), matrix(1), matrix(2), static_cast<float*>(data[10]));
}

}  // namespace

// x [T, H], experts [T, K] (E: none, of weight 0), weights [T, K], valid tokens [T],
// w1 and w3 [E, I, H], w2 [E, H, I]
// -> y [T, H]
extern "C" int FusedExperts(int parameters, void** data, int*, int64_t** shapes,
                            const char** dtypes, void*, void*) {
  if (!AreOfTypes("fiffffff", parameters, dtypes)) return kArguments;
  return ComputePlain<float>(data, shapes);
}

// The same with matrices in bfloat16; rows are rounded to bfloat16 before each product.
extern "C" int Bfloat16FusedExperts(int parameters, void** data, int*, int64_t** shapes,
                                    const char** dtypes, void*, void*) {
  if (!AreOfTypes("fiffhhhf", parameters, dtypes)) return kArguments;
  return ComputePlain<uint16_t>(data, shapes);
}

// The same with w1, its scales [E, I, 1], w3, its scales, w2 and its scales [E, H, 1].
extern "C" int Int8FusedExperts(int parameters, void** data, int*, int64_t** shapes,
                                const char** dtypes, void*, void*) {
  if (!AreOfTypes("fiffcfcfcff", parameters, dtypes)) return kArguments;
  return ComputeScaled<Int8>(data, shapes, 1);
}

// Likewise, with two codes in a byte and scales [E, rows, groups].
extern "C" int Int4FusedExperts(int parameters, void** data, int*, int64_t** shapes,
                                const char** dtypes, void*, void*) {
  if (!AreOfTypes("fiffufufuff", parameters, dtypes)) return kArguments;
  return ComputeScaled<Int4>(data, shapes, 2);
}
