// Attention of single positions: torch.ops.normexp.attend_to_past and attend_to_source of
// decoder_attention.py.
//
// A query reads the keys and values of its positions where they lie; what is hidden from it is not
// read at all.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "exponential.h"

namespace {

constexpr int64_t kLanes = 16;
using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));

inline Floats load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

inline void store(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }

inline int64_t rounded_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// By halves in registers: a loop over the lanes takes three times as long as the rest of `dot`.
inline float sum_of(Floats values) {
  using Half = float __attribute__((vector_size(sizeof(Floats) / 2)));
  using Quarter = float __attribute__((vector_size(sizeof(Floats) / 4)));
  Half halves[2];
  std::memcpy(halves, &values, sizeof values);
  Half half = halves[0] + halves[1];
  Quarter quarters[2];
  std::memcpy(quarters, &half, sizeof half);
  Quarter lanes = quarters[0] + quarters[1];
  return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

inline float dot(const float* a, const float* b, int64_t size) {
  Floats sums = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) sums += load(a + i) * load(b + i);
  float sum = sum_of(sums);
  for (; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

// sum += weight * values
inline void add(float* sum, float weight, const float* values, int64_t size) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(sum + i, load(sum + i) + weight * load(values + i));
  for (; i < size; ++i) sum[i] += weight * values[i];
}

// scores become exp(scores - max); returns one over their sum. Behind the scores there is room up
// to a multiple of kLanes.
float softmax(float* scores, int64_t count) {
  int64_t padded = rounded_up(count);
  std::fill(scores + count, scores + padded, -INFINITY);
  Floats best = load(scores);
  for (int64_t i = kLanes; i < padded; i += kLanes) {
    Floats values = load(scores + i);
    best = values > best ? values : best;
  }
  float lanes[kLanes];
  store(lanes, best);
  float top = *std::max_element(lanes, lanes + kLanes);
  Floats sums = {};
  for (int64_t i = 0; i < padded; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      scores[i + lane] = exp_nonpositive(scores[i + lane] - top);
    }
    sums += load(scores + i);
  }
  return 1 / sum_of(sums);
}

// The scratch memory of a thread.
struct Scratch {
  std::vector<const float*> keys, values;  // rows of the positions that a query sees
  std::vector<float> query, scores;

  Scratch(int64_t positions, int64_t channels, int64_t heads)
      : query(channels), scores(heads * rounded_up(positions)) {
    keys.reserve(positions);
    values.reserve(positions);
  }
};

// One query (C) over the rows of keys and values (C) that scratch names. Position by position and
// all heads of it, so that memory is read in order.
void attend(const float* query, float* mixed, int64_t channels, int64_t heads, Scratch& scratch) {
  int64_t size = channels / heads;
  auto count = static_cast<int64_t>(scratch.keys.size());
  int64_t room = rounded_up(count);
  float scale = 1 / std::sqrt(static_cast<float>(size));
  for (int64_t i = 0; i < channels; ++i) scratch.query[i] = query[i] * scale;
  float* scores = scratch.scores.data();
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      scores[h * room + t] =
          dot(scratch.query.data() + h * size, scratch.keys[t] + h * size, size);
    }
  }
  std::fill(mixed, mixed + channels, 0.0f);
  for (int64_t h = 0; h < heads; ++h) {
    float inverse = softmax(scores + h * room, count);
    for (int64_t t = 0; t < count; ++t) scores[h * room + t] *= inverse;
  }
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      add(mixed + h * size, scores[h * room + t], scratch.values[t] + h * size, size);
    }
  }
}

void check_floats(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == at::kFloat && tensor.is_contiguous(),
              "decoder attention: tensors must be contiguous float32 on the CPU");
}

// See attend_to_past in decoder_attention.py.
at::Tensor attend_to_past(const at::Tensor& qkv, at::Tensor& keys, at::Tensor& values,
                          const at::Tensor& ancestors, int64_t position, int64_t heads) {
  for (const at::Tensor& tensor : {qkv, keys, values}) check_floats(tensor);
  TORCH_CHECK(ancestors.is_contiguous() && ancestors.scalar_type() == at::kLong,
              "attend_to_past: ancestors must be contiguous int64");
  int64_t sentences = keys.size(0), room = keys.size(1), beam = keys.size(2);
  int64_t channels = keys.size(3), rows = qkv.numel() / (sentences * 3 * channels);
  TORCH_CHECK(keys.sizes() == values.sizes() && rows <= beam && position < room &&
                  ancestors.sizes() == at::IntArrayRef({sentences, beam, room}) &&
                  qkv.numel() == sentences * rows * 3 * channels && channels % heads == 0,
              "attend_to_past: shapes do not fit");
  at::Tensor mixed = at::empty({1, sentences * rows, channels}, qkv.options());
  const float* in = qkv.const_data_ptr<float>();
  const int64_t* ancestor = ancestors.const_data_ptr<int64_t>();
  float *key = keys.data_ptr<float>(), *value = values.data_ptr<float>();
  float* out = mixed.data_ptr<float>();
  at::parallel_for(0, sentences, 1, [=](int64_t begin, int64_t end) {
    Scratch scratch(position + 1, channels, heads);
    for (int64_t b = begin; b < end; ++b) {
      auto row_at = [=](int64_t t, int64_t k) { return ((b * room + t) * beam + k) * channels; };
      for (int64_t k = 0; k < rows; ++k) {
        const float* from = in + (b * rows + k) * 3 * channels;
        std::copy_n(from + channels, channels, key + row_at(position, k));
        std::copy_n(from + 2 * channels, channels, value + row_at(position, k));
      }
      for (int64_t k = 0; k < rows; ++k) {
        scratch.keys.clear();
        scratch.values.clear();
        for (int64_t t = 0; t <= position; ++t) {
          int64_t at = row_at(t, ancestor[(b * beam + k) * room + t]);
          scratch.keys.push_back(key + at);
          scratch.values.push_back(value + at);
        }
        int64_t row = b * rows + k;
        attend(in + row * 3 * channels, out + row * channels, channels, heads, scratch);
      }
    }
  });
  return mixed;
}

// See attend_to_source in decoder_attention.py.
at::Tensor attend_to_source(const at::Tensor& query, const at::Tensor& keys,
                            const at::Tensor& values, const std::optional<at::Tensor>& padding,
                            int64_t heads) {
  for (const at::Tensor& tensor : {query, keys, values}) check_floats(tensor);
  int64_t sentences = keys.size(0), length = keys.size(1), channels = keys.size(2);
  int64_t rows = query.numel() / (sentences * channels);
  TORCH_CHECK(keys.sizes() == values.sizes() && query.numel() == sentences * rows * channels &&
                  channels % heads == 0,
              "attend_to_source: shapes do not fit");
  const bool* hidden = nullptr;
  if (padding) {
    TORCH_CHECK(padding->is_contiguous() && padding->scalar_type() == at::kBool &&
                    padding->sizes() == at::IntArrayRef({sentences, length}),
                "attend_to_source: padding must be contiguous bool (B, S)");
    hidden = padding->const_data_ptr<bool>();
  }
  at::Tensor mixed = at::empty({1, sentences * rows, channels}, query.options());
  const float *in = query.const_data_ptr<float>(), *key = keys.const_data_ptr<float>();
  const float* value = values.const_data_ptr<float>();
  float* out = mixed.data_ptr<float>();
  at::parallel_for(0, sentences, 1, [=](int64_t begin, int64_t end) {
    Scratch scratch(length, channels, heads);
    for (int64_t b = begin; b < end; ++b) {
      scratch.keys.clear();
      scratch.values.clear();
      for (int64_t s = 0; s < length; ++s) {
        int64_t at = b * length + s;
        if (hidden && hidden[at]) continue;
        scratch.keys.push_back(key + at * channels);
        scratch.values.push_back(value + at * channels);
      }
      for (int64_t row = b * rows; row < (b + 1) * rows; ++row) {
        attend(in + row * channels, out + row * channels, channels, heads, scratch);
      }
    }
  });
  return mixed;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(normexp, m) {
  m.def(
      "attend_to_past(Tensor qkv, Tensor(a!) keys, Tensor(b!) values, Tensor ancestors, "
      "int position, int heads) -> Tensor",
      &attend_to_past);
  m.def(
      "attend_to_source(Tensor query, Tensor keys, Tensor values, Tensor? padding, int heads) "
      "-> Tensor",
      &attend_to_source);
}
