// Shared by the kernels of this folder: loops over the tokens of a batch with sums per channel.
//
// Tokens are rows of C channels. Threads get blocks of rows in turn, so that padding, which is at
// the end of a batch, is divided among them; sums are in float over a block (double for double), in
// double over blocks, and over threads in their order, so that results repeat to the bit for one
// number of threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace normexp {

using at::Tensor;
using Vector = std::vector<double>;  // one value per channel

// c10's own conversions branch on NaN, which keeps loops over them from being vectorized.
struct BFloat16 {
  uint16_t bits;
};

// The type in which values of type T are summed.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A value as its accumulator's type.
inline float load(float value) { return value; }
inline double load(double value) { return value; }
inline float load(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// Rounds an accumulator's value to the type of `to`.
inline void store(float& to, float value) { to = value; }
inline void store(double& to, double value) { to = value; }
inline void store(BFloat16& to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = static_cast<uint16_t>(value != value ? 0x7fc0 : nearest_even);
}

// Which rows of x (T, B, C) with mask (B, T), or of x (N, C) with mask (N,), are padding.
class Padding {
 public:
  Padding(const Tensor& x, const std::optional<Tensor>& mask) {
    if (!mask) return;
    mask_ = mask->const_data_ptr<bool>();
    sentences_ = x.dim() == 3 ? x.size(1) : 1;
    sentence_stride_ = x.dim() == 3 ? mask->stride(0) : 0;
    time_stride_ = mask->stride(-1);
  }
  bool operator()(int64_t row) const {
    return mask_ && mask_[row % sentences_ * sentence_stride_ + row / sentences_ * time_stride_];
  }

 private:
  const bool* mask_ = nullptr;
  int64_t sentences_ = 1, sentence_stride_ = 0, time_stride_ = 0;
};

constexpr int64_t kBlockRows = 64;
constexpr int kRowsAtOnce = 4;  // share one load and store of the sums

// Threads that are worth starting for so many rows.
inline int num_threads(int64_t rows) {
  return static_cast<int>(
      std::clamp<int64_t>(rows / kBlockRows, 1, std::max(1, at::get_num_threads())));
}

// Calls block(thread, first, last) for every block of rows, in order within a thread.
template <class Block>
void over_blocks(int64_t rows, const Block& block) {
  const int threads = num_threads(rows);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t first = thread * kBlockRows; first < rows; first += threads * kBlockRows) {
        block(static_cast<int>(thread), first, std::min(rows, first + kBlockRows));
      }
    }
  });
}

// Calls body(std::integral_constant<int, R>, rows) for the rows of [first, last) for which
// wanted(row) is true, R of them at once; returns how many there were.
template <class Wanted, class Body>
int64_t in_groups(int64_t first, int64_t last, const Wanted& wanted, const Body& body) {
  int64_t rows[kRowsAtOnce], held = 0, count = 0;
  for (int64_t row = first; row < last; ++row) {
    if (!wanted(row)) continue;
    rows[held++] = row;
    ++count;
    if (held == kRowsAtOnce) {
      body(std::integral_constant<int, kRowsAtOnce>{}, rows);
      held = 0;
    }
  }
  for (int64_t i = 0; i < held; ++i) body(std::integral_constant<int, 1>{}, rows + i);
  return count;
}

// Sums per channel of several quantities, by thread and block, and the number of rows summed.
template <class A>
class Sums {
 public:
  Sums(int64_t rows, int quantities, int64_t channels)
      : width_(quantities * channels),
        threads_(num_threads(rows)),
        blocks_(threads_ * width_),
        totals_(threads_ * width_),
        counts_(threads_) {}

  // Where a thread sums a block, (quantities, C); zero at the block's beginning.
  A* block(int thread) { return blocks_.data() + thread * width_; }

  // Adds a thread's block of `count` rows to its totals, and clears the block.
  void end_block(int thread, int64_t count) {
    A* block = this->block(thread);
    double* total = totals_.data() + thread * width_;
    for (int64_t i = 0; i < width_; ++i) {
      total[i] += block[i];
      block[i] = 0;
    }
    counts_[thread] += count;
  }

  // The sum (C,) of one quantity over all threads.
  Vector total(int quantity, int64_t channels) const {
    Vector result(channels);
    for (int thread = 0; thread < threads_; ++thread) {
      const double* total = totals_.data() + thread * width_ + quantity * channels;
      for (int64_t c = 0; c < channels; ++c) result[c] += total[c];
    }
    return result;
  }

  // The number of rows over all threads.
  double count() const {
    int64_t count = 0;
    for (int64_t of_thread : counts_) count += of_thread;
    return static_cast<double>(count);
  }

 private:
  int64_t width_;
  int threads_;
  std::vector<A> blocks_;
  Vector totals_;
  std::vector<int64_t> counts_;
};

// Calls body(values) with values of the type of the tensor's content.
template <class Body>
void with_values(const Tensor& tensor, const Body& body) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return body(tensor.mutable_data_ptr<float>());
    case at::kDouble:
      return body(tensor.mutable_data_ptr<double>());
    case at::kBFloat16:
      return body(reinterpret_cast<BFloat16*>(tensor.mutable_data_ptr<at::BFloat16>()));
    default:
      TORCH_CHECK_VALUE(false, "no native kernel for ", tensor.scalar_type());
  }
}

// The content of a tensor in double.
inline Vector read(const Tensor& tensor) {
  const Tensor dense = tensor.contiguous();
  Vector result(dense.numel());
  with_values(dense, [&](const auto* values) {
    for (size_t i = 0; i < result.size(); ++i) result[i] = load(values[i]);
  });
  return result;
}

// Writes to a buffer and counts its version up, as torch's own writing does, so that autograd
// notices.
inline void overwrite(const Tensor& tensor, const Vector& content) {
  TORCH_CHECK_VALUE(tensor.is_contiguous(), "buffers must be contiguous");
  with_values(tensor, [&](auto* values) {
    using T = std::remove_pointer_t<decltype(values)>;
    for (size_t i = 0; i < content.size(); ++i) {
      store(values[i], static_cast<Accumulator<T>>(content[i]));
    }
  });
  tensor.unsafeGetTensorImpl()->bump_version();
}

// A new tensor (K,) of a type, with this content.
inline Tensor make(const Vector& content, at::ScalarType type) {
  const Tensor tensor = at::empty({static_cast<int64_t>(content.size())}, type);
  overwrite(tensor, content);
  return tensor;
}

// The content converted to type A.
template <class A>
std::vector<A> as(const Vector& content) {
  return std::vector<A>(content.begin(), content.end());
}

// Calls body with a null pointer to the type of the content of x.
template <class Body>
void by_type(const Tensor& x, const Body& body) {
  with_values(x, [&](auto* values) { body(static_cast<decltype(values)>(nullptr)); });
}

// Pointer to the content of x, whose type is T.
template <class T>
const T* content(const Tensor& x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return reinterpret_cast<const T*>(x.const_data_ptr<at::BFloat16>());
  } else {
    return x.const_data_ptr<T>();
  }
}

// As `content`, for writing.
template <class T>
T* writable(const Tensor& x) {
  return const_cast<T*>(content<T>(x));
}

// Raises ValueError unless x lies dense in this CPU's memory, each of `vectors` has a value per
// channel there and each of `counters` is one int64 there. Nothing else looks at sizes.
inline void check(const Tensor& x, const std::optional<Tensor>& mask,
                  std::initializer_list<const Tensor*> vectors,
                  std::initializer_list<const Tensor*> counters) {
  const auto here = [](const Tensor& t) { return t.device().is_cpu() && t.layout() == at::kStrided; };
  TORCH_CHECK_VALUE((x.dim() == 2 || x.dim() == 3) && here(x) && x.is_contiguous(),
                    "x must be a contiguous tensor (T, B, C) or (N, C) on the CPU");
  for (const Tensor* vector : vectors) {
    TORCH_CHECK_VALUE(here(*vector) && vector->dim() == 1 && vector->size(0) == x.size(-1),
                      "parameters and buffers must be on the CPU and have ", x.size(-1),
                      " entries, got ", vector->sizes(), " on ", vector->device());
  }
  for (const Tensor* counter : counters) {
    TORCH_CHECK_VALUE(here(*counter) && counter->numel() == 1 && counter->scalar_type() == at::kLong,
                      "counters must be one int64 on the CPU");
  }
  if (!mask) return;
  const auto fits = x.dim() == 3 ? mask->dim() == 2 && mask->size(0) == x.size(1) &&
                                       mask->size(1) == x.size(0)
                                 : mask->dim() == 1 && mask->size(0) == x.size(0);
  TORCH_CHECK_VALUE(here(*mask) && mask->scalar_type() == at::kBool && fits,
                    "the mask must be bool (B, T) or (N,) on the CPU, got ", mask->sizes());
}

// A copy of the mask, because the caller may write to the original before backward.
inline std::optional<Tensor> copy_of(const std::optional<Tensor>& mask) {
  return mask ? std::optional<Tensor>(mask->clone()) : std::nullopt;
}

// T*B or N, the number of rows of x.
inline int64_t num_rows(const Tensor& x) { return x.numel() / std::max<int64_t>(1, x.size(-1)); }

// Content that a forward keeps for its backward, besides the tensors that autograd saves.
template <class Content>
struct Kept : torch::CustomClassHolder {
  Content content;
};

// Keeps content for the backward of this forward.
template <class Content>
void keep(torch::autograd::AutogradContext* ctx, Content content) {
  auto kept = c10::make_intrusive<Kept<Content>>();
  kept->content = std::move(content);
  ctx->saved_data["kept"] = c10::IValue::make_capsule(std::move(kept));
}

// The content that the forward has kept.
template <class Content>
const Content& kept(torch::autograd::AutogradContext* ctx) {
  const auto capsule = ctx->saved_data["kept"].toCapsule();
  return static_cast<const Kept<Content>&>(*capsule).content;
}

// What a forward saves for its repetition: two vectors (C,), a decision, the number of real tokens.
struct Choice {
  Vector first, second;
  bool by_batch;
  double n;
};

// A choice as one tensor (2 C + 2,) of doubles.
inline Tensor pack(const Choice& choice) {
  Vector packed = choice.first;
  packed.insert(packed.end(), choice.second.begin(), choice.second.end());
  packed.insert(packed.end(), {static_cast<double>(choice.by_batch), choice.n});
  return make(packed, at::kDouble);
}

// The inverse of `pack`.
inline Choice unpack(const Tensor& tensor, int64_t channels) {
  TORCH_CHECK_VALUE(tensor.numel() == 2 * channels + 2, "not what a forward saved");
  const Vector packed = read(tensor);
  const auto middle = packed.begin() + channels;
  return {Vector(packed.begin(), middle), Vector(middle, packed.end() - 2),
          packed[packed.size() - 2] != 0, packed.back()};
}

// Whether a batch of n real tokens with these statistics may change the state; counts it in
// num_rejected where only the statistics are at fault. As RunningNorm._is_finite_batch.
inline bool is_finite_batch(double n, const Tensor& buffer, const Tensor& num_rejected,
                   std::initializer_list<const Vector*> statistics) {
  const bool in_float = buffer.scalar_type() != at::kDouble;
  bool finite = true;
  for (const Vector* values : statistics) {
    for (double value : *values) {
      finite &= in_float ? std::isfinite(static_cast<float>(value)) : std::isfinite(value);
    }
  }
  if (n > 0 && !finite) *num_rejected.mutable_data_ptr<int64_t>() += 1;
  return n > 0 && finite;
}

// step <- step + 1
inline void count_step(const Tensor& step) {
  *step.mutable_data_ptr<int64_t>() += 1;
  step.unsafeGetTensorImpl()->bump_version();
}

// (1 - update_rate) before + update_rate value, exact at both ends as torch.lerp is
inline double lerp(double before, double value, double update_rate) {
  const double apart = value - before;
  return update_rate < 0.5 ? before + update_rate * apart : value - (1 - update_rate) * apart;
}

// running (C,) <- (1 - update_rate) running + update_rate value
inline void average(const Tensor& running, const Vector& value, double update_rate) {
  Vector result = read(running);
  for (size_t c = 0; c < result.size(); ++c) result[c] = lerp(result[c], value[c], update_rate);
  overwrite(running, result);
}

// Makes differentiating these gradients an error, as torch's once_differentiable does in Python.
inline torch::autograd::variable_list once_differentiable(torch::autograd::variable_list gradients) {
  if (!at::GradMode::is_enabled()) return gradients;
  for (Tensor& gradient : gradients) gradient.set_requires_grad(true);  // or there is no error
  const auto refuse = std::make_shared<torch::autograd::DelayedError>(
      "trying to differentiate twice a normalization whose backward is not the derivative of its "
      "forward (once_differentiable)",
      gradients.size());
  return (*refuse)(std::move(gradients));
}

// y = (x - mean) scale + shift at real tokens, zero at padding; with kSum also the sums of x^2.
// mean may be null if kCenter is false.
template <class T, bool kSum, bool kCenter>
void scale_tokens(const Tensor& x, const Padding& padding, const Vector& scale_of,
                  const Vector& shift_of, const Vector* mean_of, const Tensor& y,
                  Sums<Accumulator<T>>* sums) {
  using A = Accumulator<T>;
  const int64_t channels = x.size(-1);
  const auto scale_values = as<A>(scale_of), shift_values = as<A>(shift_of);
  const auto mean_values = kCenter ? as<A>(*mean_of) : std::vector<A>();
  const A *scale = scale_values.data(), *shift = shift_values.data(), *mean = mean_values.data();
  const T* from = content<T>(x);
  T* to = writable<T>(y);
  over_blocks(num_rows(x), [&](int thread, int64_t first, int64_t last) {
    A* sum_sq = kSum ? sums->block(thread) : nullptr;
    const auto token = [&](int64_t row) {
      if (!padding(row)) return true;
      std::memset(static_cast<void*>(to + row * channels), 0, channels * sizeof(T));
      return false;
    };
    const int64_t count = in_groups(first, last, token, [&](auto at_once, const int64_t* rows) {
      constexpr int kRows = decltype(at_once)::value;
      const T* in[kRows];
      T* out[kRows];
      for (int r = 0; r < kRows; ++r) {
        in[r] = from + rows[r] * channels;
        out[r] = to + rows[r] * channels;
      }
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        A sum = 0;
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const A value = load(in[r][c]);
          if constexpr (kSum) sum += value * value;
          store(out[r][c], (kCenter ? value - mean[c] : value) * scale[c] + shift[c]);
        }
        if constexpr (kSum) sum_sq[c] += sum;
      }
    });
    if constexpr (kSum) sums->end_block(thread, count);
  });
}

// Sums over the real tokens: quantity 0 of gradient (x - mean), quantity 1 of gradient.
template <class T, bool kCenter>
void sum_products(const Tensor& x, const Tensor& gradient, const Padding& padding,
                  const Vector* mean_of, Sums<Accumulator<T>>& sums) {
  using A = Accumulator<T>;
  const int64_t channels = x.size(-1);
  const auto mean_values = kCenter ? as<A>(*mean_of) : std::vector<A>();
  const A* mean = mean_values.data();
  const T *from = content<T>(x), *upstream = content<T>(gradient);
  over_blocks(num_rows(x), [&](int thread, int64_t first, int64_t last) {
    A *products = sums.block(thread), *plain = products + channels;
    const auto token = [&](int64_t row) { return !padding(row); };
    const int64_t count = in_groups(first, last, token, [&](auto at_once, const int64_t* rows) {
      constexpr int kRows = decltype(at_once)::value;
      const T *in[kRows], *up[kRows];
      for (int r = 0; r < kRows; ++r) {
        in[r] = from + rows[r] * channels;
        up[r] = upstream + rows[r] * channels;
      }
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        A product = 0, sum = 0;
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const A value = load(in[r][c]), g = load(up[r][c]);
          product += g * (kCenter ? value - mean[c] : value);
          sum += g;
        }
        products[c] += product;
        plain[c] += sum;
      }
    });
    sums.end_block(thread, count);
  });
}

// dx = gradient scale + (x - mean) slope + shift at real tokens, zero at padding; with kSum also
// the sums of sum_products. mean and shift may be null if kCenter is false.
template <class T, bool kSum, bool kCenter>
void propagate(const Tensor& x, const Tensor& gradient, const Padding& padding,
               const Vector& scale_of, const Vector& slope_of, const Vector* mean_of,
               const Vector* shift_of, const Tensor& dx, Sums<Accumulator<T>>* sums) {
  using A = Accumulator<T>;
  const int64_t channels = x.size(-1);
  const auto scale_values = as<A>(scale_of), slope_values = as<A>(slope_of);
  const auto mean_values = kCenter ? as<A>(*mean_of) : std::vector<A>();
  const auto shift_values = kCenter ? as<A>(*shift_of) : std::vector<A>();
  const A *scale = scale_values.data(), *slope = slope_values.data();
  const A *mean = mean_values.data(), *shift = shift_values.data();
  const T *from = content<T>(x), *upstream = content<T>(gradient);
  T* to = writable<T>(dx);
  over_blocks(num_rows(x), [&](int thread, int64_t first, int64_t last) {
    A* products = kSum ? sums->block(thread) : nullptr;
    A* plain = kSum ? products + channels : nullptr;
    const auto token = [&](int64_t row) {
      if (!padding(row)) return true;
      std::memset(static_cast<void*>(to + row * channels), 0, channels * sizeof(T));
      return false;
    };
    const int64_t count = in_groups(first, last, token, [&](auto at_once, const int64_t* rows) {
      constexpr int kRows = decltype(at_once)::value;
      const T *in[kRows], *up[kRows];
      T* out[kRows];
      for (int r = 0; r < kRows; ++r) {
        in[r] = from + rows[r] * channels;
        up[r] = upstream + rows[r] * channels;
        out[r] = to + rows[r] * channels;
      }
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        A product = 0, sum = 0;
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const A value = load(in[r][c]), g = load(up[r][c]);
          if constexpr (kSum) {
            product += g * value;
            sum += g;
          }
          if constexpr (kCenter) {
            store(out[r][c], g * scale[c] + (value - mean[c]) * slope[c] + shift[c]);
          } else {
            store(out[r][c], g * scale[c] + value * slope[c]);
          }
        }
        if constexpr (kSum) {
          products[c] += product;
          plain[c] += sum;
        }
      }
    });
    if constexpr (kSum) sums->end_block(thread, count);
  });
}

}  // namespace normexp
