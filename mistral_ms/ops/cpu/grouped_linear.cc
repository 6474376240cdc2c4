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
// Entry points for mindspore.ops.Custom("aot"): parameters are the inputs, then the output; a
// result other than zero raises an error in Python.

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

namespace {

enum Result { kDone = 0, kNoOneDnn = 1, kArguments = 2, kProduct = 3 };

constexpr int64_t kWorkOfThread = 1 << 19;  // multiplications; fewer are done before a thread begins
constexpr int64_t kColumnsOfThread = 64;

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

Sgemm OneDnn() {
  static const Sgemm sgemm = FindSgemm();
  return sgemm;
}

// The types are those of three inputs and one output, with the group sizes at `sizes`; and there is
// a oneDNN.
Result Check(int parameters, const char** dtypes, int sizes) {
  if (OneDnn() == nullptr) return kNoOneDnn;
  if (parameters != 4) return kArguments;
  for (int i = 0; i < 4; ++i) {
    if (std::strcmp(dtypes[i], i == sizes ? "int32" : "float32") != 0) return kArguments;
  }
  return kDone;
}

struct Group {
  int64_t first, rows;
};

// Where the rows of each expert lie; the last group is what lies behind them.
std::vector<Group> Groups(const void* sizes, int64_t experts, int64_t rows) {
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

// Divides columns among threads and calls compute(first column, columns) for each share.
template <typename Compute>
Result Divide(int64_t columns, int64_t work, Compute compute) {
  int64_t threads = std::min(work / kWorkOfThread, columns / kColumnsOfThread);
  threads = std::clamp<int64_t>(threads, 1, std::max(1u, std::thread::hardware_concurrency()));
  std::atomic<bool> failed{false};
  const auto share = [&](int64_t i) {
    const int64_t begin = columns * i / threads, end = columns * (i + 1) / threads;
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
  return failed ? kProduct : kDone;
}

void Clear(float* matrix, const Group& rows, int64_t width, int64_t column, int64_t columns) {
  for (int64_t r = rows.first; r < rows.first + rows.rows; ++r) {
    std::fill_n(matrix + r * width + column, columns, 0.0f);
  }
}

}  // namespace

// x [R, I], w [E, O, I], group sizes [E] -> y [R, O]
extern "C" int GroupedLinear(int parameters, void** data, int*, int64_t** shapes,
                             const char** dtypes, void*, void*) {
  if (const Result wrong = Check(parameters, dtypes, 2)) return wrong;
  const int64_t R = shapes[0][0], I = shapes[0][1], E = shapes[1][0], O = shapes[1][1];
  if (shapes[1][2] != I || shapes[2][0] != E) return kArguments;
  const auto* x = static_cast<const float*>(data[0]);
  const auto* w = static_cast<const float*>(data[1]);
  auto* y = static_cast<float*>(data[3]);
  const auto groups = Groups(data[2], E, R);
  return Divide(O, R * O * I, [&](int64_t column, int64_t columns) {
    for (int64_t e = 0; e < E; ++e) {
      const auto [first, rows] = groups[e];
      if (rows == 0) continue;
      if (OneDnn()('N', 'T', rows, columns, I, 1.0f, x + first * I, I,
                   w + (e * O + column) * I, I, 0.0f, y + first * O + column, O)) {
        return 1;
      }
    }
    Clear(y, groups[E], O, column, columns);
    return 0;
  });
}

// dy [R, O], w [E, O, I], group sizes [E] -> dx [R, I]
extern "C" int GroupedLinearInputGradient(int parameters, void** data, int*, int64_t** shapes,
                                          const char** dtypes, void*, void*) {
  if (const Result wrong = Check(parameters, dtypes, 2)) return wrong;
  const int64_t R = shapes[0][0], O = shapes[0][1], E = shapes[1][0], I = shapes[1][2];
  if (shapes[1][1] != O || shapes[2][0] != E) return kArguments;
  const auto* dy = static_cast<const float*>(data[0]);
  const auto* w = static_cast<const float*>(data[1]);
  auto* dx = static_cast<float*>(data[3]);
  const auto groups = Groups(data[2], E, R);
  return Divide(I, R * O * I, [&](int64_t column, int64_t columns) {
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
}

// dy [R, O], x [R, I], group sizes [E] -> dw [E, O, I]
extern "C" int GroupedLinearWeightGradient(int parameters, void** data, int*, int64_t** shapes,
                                           const char** dtypes, void*, void*) {
  if (const Result wrong = Check(parameters, dtypes, 2)) return wrong;
  const int64_t R = shapes[0][0], O = shapes[0][1], I = shapes[1][1], E = shapes[2][0];
  if (shapes[1][0] != R) return kArguments;
  const auto* dy = static_cast<const float*>(data[0]);
  const auto* x = static_cast<const float*>(data[1]);
  auto* dw = static_cast<float*>(data[3]);
  const auto groups = Groups(data[2], E, R);
  // an expert's matrix is divided by rows: O of them
  return Divide(O, R * O * I, [&](int64_t column, int64_t columns) {
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
}
