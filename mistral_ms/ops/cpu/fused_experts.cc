// All experts of a few tokens, as in decoding: the chosen experts' matrices are read once, in place.

#include "common.h"

namespace {

constexpr int64_t kWorkOfThread = 1 << 17;  // multiplications

// One choice of a token.
struct Choice {
  int64_t token, number;
};

// A number as products with such matrices take it.
INLINE float Taken(float x, const float*) { return x; }
INLINE float Taken(float x, const uint16_t*) { return Widened(Rounded(x)); }

template <typename W>
INLINE void GateAndUpOf(const std::vector<Choice>& choices, const float* x, const W* w1, const W* w3,
                        float* hidden, int64_t first, int64_t rows, int64_t H, int64_t I) {
  for (int64_t i = first; i < first + rows; ++i) {
    for (const Choice& choice : choices) {
      const float* own_x = x + choice.token * H;
      const float gate = Dot(own_x, w1 + i * H, H), up = Dot(own_x, w3 + i * H, H);
      hidden[choice.number * I + i] = Taken(gate * Sigmoid(gate) * up, w1);
    }
  }
}

template <typename W>
INLINE void DownOf(const std::vector<Choice>& choices, const float* hidden, const W* w2, float* out,
                   int64_t first, int64_t rows, int64_t H, int64_t I) {
  for (int64_t h = first; h < first + rows; ++h) {
    for (const Choice& choice : choices) {
      out[choice.number * H + h] = Dot(hidden + choice.number * I, w2 + h * I, I);
    }
  }
}

// hidden[choice, i] = silu(w1[i] x) * (w3[i] x) of rows i of one expert's matrices
MULTIVERSION void GateAndUp(const std::vector<Choice>& choices, const float* x, const float* w1,
                            const float* w3, float* hidden, int64_t first, int64_t rows, int64_t H,
                            int64_t I) {
  GateAndUpOf(choices, x, w1, w3, hidden, first, rows, H, I);
}
MULTIVERSION void GateAndUp(const std::vector<Choice>& choices, const float* x, const uint16_t* w1,
                            const uint16_t* w3, float* hidden, int64_t first, int64_t rows,
                            int64_t H, int64_t I) {
  GateAndUpOf(choices, x, w1, w3, hidden, first, rows, H, I);
}

// out[choice, h] = w2[h] hidden[choice] of rows h of one expert's matrix
MULTIVERSION void Down(const std::vector<Choice>& choices, const float* hidden, const float* w2,
                       float* out, int64_t first, int64_t rows, int64_t H, int64_t I) {
  DownOf(choices, hidden, w2, out, first, rows, H, I);
}
MULTIVERSION void Down(const std::vector<Choice>& choices, const float* hidden, const uint16_t* w2,
                       float* out, int64_t first, int64_t rows, int64_t H, int64_t I) {
  DownOf(choices, hidden, w2, out, first, rows, H, I);
}

int64_t Grain(int64_t rows, int64_t work) { return std::max<int64_t>(16, rows * kWorkOfThread / work); }

// See FusedExperts; W is the type of the matrices.
template <typename W>
int Compute(void** data, int64_t** shapes) {
  const int64_t T = shapes[0][0], H = shapes[0][1], K = shapes[1][1], E = shapes[4][0],
                I = shapes[4][1];
  if (shapes[1][0] != T || shapes[2][0] != T || shapes[2][1] != K || shapes[3][0] != T ||
      shapes[4][2] != H || shapes[5][0] != E || shapes[5][1] != I || shapes[5][2] != H ||
      shapes[6][0] != E || shapes[6][1] != H || shapes[6][2] != I) {
    return kArguments;
  }
  const auto* given_x = static_cast<const float*>(data[0]);
  const auto* experts = static_cast<const int32_t*>(data[1]);
  const auto* weights = static_cast<const float*>(data[2]);
  const auto* valid = static_cast<const float*>(data[3]);
  const auto* w1 = static_cast<const W*>(data[4]);
  const auto* w3 = static_cast<const W*>(data[5]);
  const auto* w2 = static_cast<const W*>(data[6]);
  auto* y = static_cast<float*>(data[7]);
  std::vector<std::vector<Choice>> choices(E);
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t number = t * K; valid[t] > 0.0f && number < (t + 1) * K; ++number) {
      if (experts[number] < 0 || experts[number] > E) return kArguments;
      if (experts[number] == E) continue;  // a choice that the gate left out
      choices[experts[number]].push_back({t, number});
    }
  }
  std::vector<float> x(T * H), hidden(T * K * I), out(T * K * H);
  for (int64_t i = 0; i < T * H; ++i) x[i] = Taken(given_x[i], w1);
  Divide(I, Grain(I, 2 * T * K * I * H), [&](int64_t first, int64_t rows) {
    for (int64_t e = 0; e < E; ++e) {
      if (choices[e].empty()) continue;
      GateAndUp(choices[e], x.data(), w1 + e * I * H, w3 + e * I * H, hidden.data(), first, rows, H, I);
    }
    return 0;
  });
  Divide(H, Grain(H, T * K * I * H), [&](int64_t first, int64_t rows) {
    for (int64_t e = 0; e < E; ++e) {
      if (!choices[e].empty()) {
        Down(choices[e], hidden.data(), w2 + e * H * I, out.data(), first, rows, H, I);
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

}  // namespace

// x [T, H], experts [T, K] (E: none, of weight 0), weights [T, K], valid tokens [T],
// w1 and w3 [E, I, H], w2 [E, H, I]
// -> y [T, H]
extern "C" int FusedExperts(int parameters, void** data, int*, int64_t** shapes,
                            const char** dtypes, void*, void*) {
  if (!AreOfTypes("fiffffff", parameters, dtypes)) return kArguments;
  return Compute<float>(data, shapes);
}

// The same with matrices in bfloat16; rows are rounded to bfloat16 before each product.
extern "C" int Bfloat16FusedExperts(int parameters, void** data, int*, int64_t** shapes,
                                    const char** dtypes, void*, void*) {
  if (!AreOfTypes("fiffhhhf", parameters, dtypes)) return kArguments;
  return Compute<uint16_t>(data, shapes);
}
