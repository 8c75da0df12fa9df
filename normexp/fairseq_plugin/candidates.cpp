// The best continuations of beams: the operator torch.ops.normexp.best_candidates of candidates.py.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

#include "exponential.h"

namespace {

constexpr int kLanes = 16;
constexpr int kVectors = 4;  // that keep a maximum or a sum of their own
constexpr int kBlock = kVectors * kLanes;
using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));

inline Floats load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

inline Floats larger(Floats one, Floats other) { return one > other ? one : other; }

struct Candidate {
  float value;
  int64_t beam, word;
};

// The best candidates so far, best first.
class Best {
 public:
  explicit Best(int64_t most) : most_(most) { kept_.reserve(most + 1); }

  void clear() {
    kept_.clear();
    least_ = -INFINITY;
  }

  // What does not exceed it would not be kept.
  float least() const { return least_; }

  void add(Candidate candidate) {
    auto place = std::upper_bound(
        kept_.begin(), kept_.end(), candidate,
        [](const Candidate& one, const Candidate& other) { return one.value > other.value; });
    kept_.insert(place, candidate);
    if (static_cast<int64_t>(kept_.size()) > most_) kept_.pop_back();
    if (static_cast<int64_t>(kept_.size()) == most_) least_ = kept_.back().value;
  }

  const std::vector<Candidate>& kept() const { return kept_; }

  // Whether there are as many as wanted and no two are equal.
  bool certain() const {
    auto equal = [](const Candidate& one, const Candidate& other) {
      return one.value == other.value;
    };
    return static_cast<int64_t>(kept_.size()) == most_ &&
           std::adjacent_find(kept_.begin(), kept_.end(), equal) == kept_.end();
  }

 private:
  int64_t most_;
  float least_ = -INFINITY;
  std::vector<Candidate> kept_;
};

float max_of(const float* row, int64_t size) {
  Floats best[kVectors];
  for (Floats& vector : best) vector = Floats{} - INFINITY;
  int64_t i = 0;
  for (; i + kBlock <= size; i += kBlock) {
    for (int j = 0; j < kVectors; ++j) best[j] = larger(load(row + i + j * kLanes), best[j]);
  }
  float largest = -INFINITY;
  for (const Floats& vector : best) {
    for (int lane = 0; lane < kLanes; ++lane) largest = std::max(largest, vector[lane]);
  }
  for (; i < size; ++i) largest = std::max(largest, row[i]);
  return largest;
}

// log(sum(exp(row - top)))
float log_sum(const float* row, int64_t size, float top) {
  Floats sums[2] = {};
  float powers[2 * kLanes];
  int64_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
    for (int lane = 0; lane < 2 * kLanes; ++lane) {
      powers[lane] = exp_nonpositive(row[i + lane] - top);
    }
    for (int j = 0; j < 2; ++j) sums[j] += load(powers + j * kLanes);
  }
  double total = 0;
  for (const Floats& vector : sums) {
    for (int lane = 0; lane < kLanes; ++lane) total += vector[lane];
  }
  for (; i < size; ++i) total += exp_nonpositive(row[i] - top);
  return static_cast<float>(std::log(total));
}

// Add the continuations of one beam, whose score so far is `total`.
void add_row(const float* row, int64_t size, float total, int64_t beam, int64_t pad, int64_t never,
             Best& best) {
  float top = max_of(row, size);
  float rest = log_sum(row, size, top);
  auto score = [=](auto logit) { return logit - top - rest + total; };
  auto exceeds = [&](Floats logits) {
    auto lanes = score(logits) > best.least();
    int any = 0;
    for (int lane = 0; lane < kLanes; ++lane) any |= lanes[lane];
    return any != 0;
  };
  auto add_some = [&](int64_t first, int64_t last) {
    for (int64_t word = first; word < last; ++word) {
      float value = score(row[word]);
      if (value > best.least() && word != pad && word != never) best.add({value, beam, word});
    }
  };
  int64_t i = 0;
  for (; i + kBlock <= size; i += kBlock) {
    // Rounding keeps the order, so that the largest logit has the largest score.
    Floats most = load(row + i);
    for (int j = 1; j < kVectors; ++j) most = larger(load(row + i + j * kLanes), most);
    if (!exceeds(most)) continue;
    for (int64_t at = i; at < i + kBlock; at += kLanes) {
      if (exceeds(load(row + at))) add_some(at, at + kLanes);
    }
  }
  add_some(i, size);
}

// For every sentence the `number` best of all continuations of its beams: their scores, beams and
// words (B, number); and whether they may be others (B): where scores are equal or too few are
// finite. logits: (B, K, V). totals: (B, K). pad and never are left out.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> best_candidates(
    const at::Tensor& logits, const at::Tensor& totals, int64_t number, int64_t pad, int64_t never) {
  for (const at::Tensor& tensor : {logits, totals}) {
    TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == at::kFloat && tensor.is_contiguous(),
                "best_candidates: tensors must be contiguous float32 on the CPU");
  }
  int64_t sentences = logits.size(0), beam = logits.size(1), size = logits.size(2);
  TORCH_CHECK(totals.sizes() == at::IntArrayRef({sentences, beam}),
              "best_candidates: totals must be (B, K)");
  at::Tensor values = at::empty({sentences, number}, logits.options());
  at::Tensor beams = at::empty({sentences, number}, logits.options().dtype(at::kLong));
  at::Tensor words = at::empty({sentences, number}, logits.options().dtype(at::kLong));
  at::Tensor unsure = at::empty({sentences}, logits.options().dtype(at::kBool));
  const float *logit = logits.const_data_ptr<float>(), *total = totals.const_data_ptr<float>();
  float* value = values.data_ptr<float>();
  int64_t *from = beams.data_ptr<int64_t>(), *word = words.data_ptr<int64_t>();
  bool* doubt = unsure.data_ptr<bool>();
  at::parallel_for(0, sentences, 1, [=](int64_t begin, int64_t stop) {
    Best best(number + 1);  // one more, to see whether the last one has an equal
    for (int64_t b = begin; b < stop; ++b) {
      best.clear();
      for (int64_t k = 0; k < beam; ++k) {
        int64_t row = b * beam + k;
        add_row(logit + row * size, size, total[row], k, pad, never, best);
      }
      doubt[b] = !best.certain();
      if (doubt[b]) continue;
      for (int64_t i = 0; i < number; ++i) {
        const Candidate& one = best.kept()[i];
        value[b * number + i] = one.value;
        from[b * number + i] = one.beam;
        word[b * number + i] = one.word;
      }
    }
  });
  return {values, beams, words, unsure};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(normexp, m) {
  m.def(
      "best_candidates(Tensor logits, Tensor totals, int number, int pad, int never) "
      "-> (Tensor, Tensor, Tensor, Tensor)",
      &best_candidates);
}
