// Loss and gradient of rows of logits: the operator torch.ops.normexp.loss_rows_ of fused_loss.py.
//
// Maxima and sums are kept per lane, which g++ turns into vector instructions.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>

#include "bfloat16.h"
#include "exponential.h"

namespace {

constexpr int kWide = 64;  // lanes that keep a maximum or a sum of their own

// The largest element of a row.
template <typename T>
float max_of(const T* row, int64_t size) {
  float best[kWide];
  std::fill(best, best + kWide, -INFINITY);
  int64_t i = 0;
  for (; i + kWide <= size; i += kWide) {
    for (int lane = 0; lane < kWide; ++lane) {
      float value = load(row[i + lane]);
      best[lane] = value > best[lane] ? value : best[lane];
    }
  }
  float largest = *std::max_element(best, best + kWide);
  for (; i < size; ++i) largest = std::max(largest, load(row[i]));
  return largest;
}

// Row by row: nll = logsumexp(logits) - logits[target]; then logits become softmax(logits) with
// `correct` subtracted at the target.
template <typename T>
void rows(T* logits, const int64_t* targets, float* nll, int64_t count, int64_t size,
          float correct, bool gradient) {
  at::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) {
    std::unique_ptr<float[]> powers(new float[size]);
    for (int64_t r = begin; r < end; ++r) {
      T* row = logits + r * size;
      float top = max_of(row, size);
      float sums[kWide] = {};
      int64_t i = 0;
      for (; i + kWide <= size; i += kWide) {
        for (int lane = 0; lane < kWide; ++lane) {
          float power = exp_nonpositive(load(row[i + lane]) - top);
          powers[i + lane] = power;
          sums[lane] += power;
        }
      }
      double total = 0;
      for (float sum : sums) total += sum;
      for (; i < size; ++i) total += powers[i] = exp_nonpositive(load(row[i]) - top);
      nll[r] = top + static_cast<float>(std::log(total)) - load(row[targets[r]]);
      if (!gradient) continue;
      float inverse = static_cast<float>(1 / total);
      for (i = 0; i < size; ++i) store(row[i], powers[i] * inverse);
      store(row[targets[r]], powers[targets[r]] * inverse - correct);
    }
  });
}

// nll (N,) of logits (N, V), which become their gradient (see `rows`), and targets (N,).
at::Tensor loss_rows_(at::Tensor& logits, const at::Tensor& targets, double correct,
                      bool gradient) {
  TORCH_CHECK(logits.is_cpu() && logits.dim() == 2 && logits.is_contiguous(),
              "loss_rows_: logits must be contiguous (N, V) on the CPU");
  TORCH_CHECK(targets.is_contiguous() && targets.scalar_type() == at::kLong &&
                  targets.numel() == logits.size(0),
              "loss_rows_: targets must be N contiguous int64");
  int64_t count = logits.size(0), size = logits.size(1);
  const int64_t* target = targets.data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK(0 <= target[i] && target[i] < size, "loss_rows_: target out of range");
  }
  at::Tensor nll = at::empty({count}, logits.options().dtype(at::kFloat));
  auto c = static_cast<float>(correct);
  if (logits.scalar_type() == at::kFloat) {
    rows(logits.data_ptr<float>(), target, nll.data_ptr<float>(), count, size, c, gradient);
  } else {
    TORCH_CHECK(logits.scalar_type() == at::kBFloat16, "loss_rows_: float32 or bfloat16 only");
    rows(static_cast<Bf16*>(logits.data_ptr()), target, nll.data_ptr<float>(), count, size, c,
         gradient);
  }
  return nll;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(normexp, m) {
  m.def(
      "loss_rows_(Tensor(a!) logits, Tensor targets, float correct, bool gradient) -> Tensor",
      &loss_rows_);
}
