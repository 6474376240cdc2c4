// Attention with a cache: rotates, enters keys and values into the cache, and attends to it.
//
// A thread has all queries of a key/value head. Few queries are multiplied here; of more, oneDNN
// multiplies a block with all keys that one of them sees. Queries at the end of a sequence's row that
// see nothing are padding: they get zeros.

#include <cmath>
#include <limits>

#include "common.h"

namespace {

constexpr int64_t kWorkOfThread = 1 << 19;  // multiplications
constexpr int64_t kFewQueries = 4;
constexpr int64_t kBlock = 64;  // queries


// Rotates the pairs (x[i], x[i + D / 2]) and scales.
MULTIVERSION void Rotate(const float* x, const float* cos, const float* sin, float scale, float* y,
                         int64_t D) {
  const int64_t R = D / 2;
  for (int64_t i = 0; i < R; ++i) {
    y[i] = (x[i] * cos[i] - x[i + R] * sin[i]) * scale;
    y[i + R] = (x[i + R] * cos[i] + x[i] * sin[i]) * scale;
  }
}

// Scores of one query -> weights that add up to one; all alike where it sees nothing.
MULTIVERSION void Softmax(float* scores, const bool* visible, int64_t M) {
  float largest = std::numeric_limits<float>::lowest();
  for (int64_t m = 0; m < M; ++m) {
    scores[m] = visible[m] ? scores[m] : std::numeric_limits<float>::lowest();
    largest = scores[m] > largest ? scores[m] : largest;
  }
  for (int64_t m = 0; m < M; ++m) scores[m] = Exp(scores[m] - largest);
  float lanes[kLanes] = {}, sum = 0.0f;
  int64_t m = 0;
  for (; m + kLanes <= M; m += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += scores[m + j];
  }
  sum = SumOfLanes(lanes);
  for (; m < M; ++m) sum += scores[m];
  const float inverse = 1.0f / sum;
  for (m = 0; m < M; ++m) scores[m] *= inverse;
}

// keys and values of one head are `width` apart
MULTIVERSION void Scores(const float* q, const float* keys, float* scores, int64_t M, int64_t D,
                         int64_t width) {
  for (int64_t m = 0; m < M; ++m) scores[m] = Dot(q, keys + m * width, D);
}

MULTIVERSION void Mix(const float* weights, const float* values, float* out, int64_t M, int64_t D,
                      int64_t width) {
  std::fill_n(out, D, 0.0f);
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t d = 0; d < D; ++d) out[d] += weights[m] * values[m * width + d];
  }
}

// How many keys must be looked at: all up to the last that one of the queries sees.
int64_t Seen(const bool* visible, int64_t queries, int64_t M) {
  for (int64_t m = M; m > 0; --m) {
    for (int64_t s = 0; s < queries; ++s) {
      if (visible[s * M + m - 1]) return m;
    }
  }
  return M;
}

// How many queries must be looked at: all up to the last that sees a key.
int64_t Seeing(const bool* visible, int64_t queries, int64_t M) {
  while (queries > 0 && std::none_of(visible + (queries - 1) * M, visible + queries * M,
                                     [](bool seen) { return seen; })) {
    --queries;
  }
  return queries;
}

}  // namespace

// q [T, N * D], k and v [T, G * D], cos and sin [B, S, 1, D / 2], visible [B, 1, S, M], rows of the
// cache that take the new entries [T], keys and values of the cache [B * M, G * D] (both written in
// place), N / G -> [T, N * D]
extern "C" int CachedAttention(int parameters, void** data, int*, int64_t** shapes,
                               const char** dtypes, void*, void*) {
  if (!AreOfTypes("fffffbiffif", parameters, dtypes)) return kArguments;
  if (OneDnn() == nullptr) return kNoOneDnn;
  const int64_t B = shapes[5][0], S = shapes[5][2], M = shapes[5][3], D = shapes[3][3] * 2;
  const int64_t N = shapes[0][1] / D, width = shapes[1][1], G = width / D;
  const int64_t group = *static_cast<const int32_t*>(data[9]);
  if (N != G * group || shapes[0][0] != B * S || shapes[3][0] != B || shapes[3][1] != S ||
      shapes[6][0] != B * S || shapes[7][0] != B * M || shapes[7][1] != width ||
      shapes[8][0] != B * M || shapes[8][1] != width) {
    return kArguments;
  }
  const auto* q = static_cast<const float*>(data[0]);
  const auto* k = static_cast<const float*>(data[1]);
  const auto* v = static_cast<const float*>(data[2]);
  const auto* cos = static_cast<const float*>(data[3]);
  const auto* sin = static_cast<const float*>(data[4]);
  const auto* visible = static_cast<const bool*>(data[5]);
  const auto* rows = static_cast<const int32_t*>(data[6]);
  auto* keys = static_cast<float*>(data[7]);
  auto* values = static_cast<float*>(data[8]);
  auto* mixed = static_cast<float*>(data[10]);
  const float scale = 1.0f / std::sqrt(static_cast<float>(D));
  for (int64_t t = 0; t < B * S; ++t) {
    if (rows[t] < t / S * M || rows[t] >= (t / S + 1) * M) return kArguments;
  }
  const bool done = Divide(B * G, kWorkOfThread / (2 * S * group * M * D) + 1, [&](int64_t first,
                                                                                int64_t count) {
    const int64_t largest = std::min(kBlock, S);
    std::vector<float> queries(largest * D), scores(largest * M);
    for (int64_t head = first; head < first + count; ++head) {
      const int64_t b = head / G, g = head % G;
      for (int64_t s = 0; s < S; ++s) {
        const int64_t token = b * S + s, row = rows[token];
        const float* new_k = k + (token * G + g) * D;
        Rotate(new_k, cos + token * D / 2, sin + token * D / 2, 1.0f, keys + row * width + g * D, D);
        std::copy_n(v + (token * G + g) * D, D, values + row * width + g * D);
      }
      const float* own_keys = keys + b * M * width + g * D;
      const float* own_values = values + b * M * width + g * D;
      const int64_t length = Seeing(visible + b * S * M, S, M);
      for (int64_t s = length; s < S; ++s) {
        std::fill_n(mixed + ((b * S + s) * N + g * group) * D, group * D, 0.0f);
      }
      const int64_t block = length <= kFewQueries ? 1 : largest;
      for (int64_t s = 0; s < length; s += block) {
        const int64_t token = b * S + s, size = std::min(block, length - s);
        const bool* own_visible = visible + token * M;
        const int64_t seen = Seen(own_visible, size, M);
        for (int64_t n = g * group; n < (g + 1) * group; ++n) {
          for (int64_t i = 0; i < size; ++i) {
            Rotate(q + ((token + i) * N + n) * D, cos + (token + i) * D / 2,
                   sin + (token + i) * D / 2, scale, &queries[i * D], D);
          }
          float* out = mixed + (token * N + n) * D;
          if (block == 1) {
            Scores(queries.data(), own_keys, scores.data(), seen, D, width);
            Softmax(scores.data(), own_visible, seen);
            Mix(scores.data(), own_values, out, seen, D, width);
            continue;
          }
          if (OneDnn()('N', 'T', size, seen, D, 1.0f, queries.data(), D, own_keys, width, 0.0f,
                       scores.data(), seen)) {
            return 1;
          }
          for (int64_t i = 0; i < size; ++i) Softmax(&scores[i * seen], own_visible + i * M, seen);
          if (OneDnn()('N', 'N', size, D, seen, 1.0f, scores.data(), seen, own_values, width, 0.0f, out,
                       N * D)) {
            return 1;
          }
        }
      }
    }
    return 0;
  });
  return done ? kDone : kProduct;
}
