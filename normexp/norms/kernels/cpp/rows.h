// Shared by the kernels of this folder: a training step as one node of autograd's graph, and loops
// over the tokens of a batch with sums per channel.
//
// Tokens are rows of C channels. Threads get blocks of rows in turn, so that padding, which is at
// the end of a batch, is divided among them; sums are in float over a block (double for double), in
// double over blocks, and over threads in their order, so that results repeat to the bit for one
// number of threads.
//
// Loops over channels are marked as `omp simd`: where the compiler has to look whether memory
// overlaps it makes two loops, which may round differently, and results would depend on addresses.
//
// A small batch takes as long as its calls do, not its arithmetic. Hence no dispatched operation,
// no lock and few allocations on the way of a step.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace normexp {

using at::Tensor;
using torch::autograd::variable_list;

// --- Number formats

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

template <class T>
constexpr at::ScalarType scalar_type() {
  if constexpr (std::is_same_v<T, BFloat16>) return at::kBFloat16;
  return std::is_same_v<T, double> ? at::kDouble : at::kFloat;
}

// --- Tensors

// The memory of a tensor whose type is T, to be read.
template <class T>
const T* content(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// The same, to be written.
template <class T>
T* writable(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Calls body with a null pointer to the type of the content of x.
template <class Body>
decltype(auto) by_type(const Tensor& x, const Body& body) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return body(static_cast<float*>(nullptr));
    case at::kDouble:
      return body(static_cast<double*>(nullptr));
    case at::kBFloat16:
      return body(static_cast<BFloat16*>(nullptr));
    default:
      TORCH_CHECK_VALUE(false, "no native kernel for ", x.scalar_type());
  }
}

// A new tensor without content, without the way through the dispatcher that at::empty takes.
inline Tensor allocate(at::IntArrayRef sizes, at::ScalarType type) {
  return at::detail::empty_cpu(sizes, type);
}
inline Tensor allocate_like(const Tensor& x) { return allocate(x.sizes(), x.scalar_type()); }

// A new tensor (C,) of `type` with these values.
template <class A>
Tensor make(const A* values, int64_t channels, at::ScalarType type) {
  const Tensor tensor = allocate({channels}, type);
  by_type(tensor, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    T* to = writable<T>(tensor);
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) store(to[c], static_cast<Accumulator<T>>(values[c]));
  });
  return tensor;
}

// The values of a vector (C,) as type A: where they are, or a copy if they have another type.
template <class A>
class Values {
 public:
  explicit Values(const Tensor& tensor) {
    if (tensor.scalar_type() == scalar_type<A>() && tensor.is_contiguous()) {
      values_ = content<A>(tensor);
      return;
    }
    const Tensor dense = tensor.contiguous();
    copy_.resize(dense.numel());
    by_type(dense, [&](auto* null) {
      const auto* from = content<std::remove_pointer_t<decltype(null)>>(dense);
      for (size_t c = 0; c < copy_.size(); ++c) copy_[c] = static_cast<A>(load(from[c]));
    });
    values_ = copy_.data();
  }
  Values(const Values&) = delete;
  const A* data() const { return values_; }
  A operator[](int64_t c) const { return values_[c]; }

 private:
  std::vector<A> copy_;
  const A* values_;
};

// Memory for `count` times C values, not initialized.
template <class A>
class Vectors {
 public:
  Vectors() = default;
  Vectors(int count, int64_t channels)
      : channels_(channels), values_(new A[static_cast<size_t>(count * channels)]) {}
  A* operator[](int which) const { return values_.get() + which * channels_; }

 private:
  int64_t channels_ = 0;
  std::unique_ptr<A[]> values_;
};

// Raises ValueError unless x lies dense in this CPU's memory, each of `vectors` has a value per
// channel there and each of `counters` is one int64 there. Nothing else looks at sizes.
inline void check(const Tensor& x, std::initializer_list<const Tensor*> vectors,
                  std::initializer_list<const Tensor*> counters) {
  const auto here = [](const Tensor& t) {
    return t.device().is_cpu() && t.layout() == at::kStrided;
  };
  TORCH_CHECK_VALUE(!x.is_nested() && (x.dim() == 2 || x.dim() == 3) && here(x) &&
                        x.is_contiguous(),
                    "x must be a contiguous tensor (T, B, C) or (N, C) on the CPU");
  TORCH_CHECK_NOT_IMPLEMENTED(!torch::autograd::isFwGradDefined(x),
                              "forward-mode differentiation through a kernel of a norm");
  for (const Tensor* vector : vectors) {
    TORCH_CHECK_NOT_IMPLEMENTED(!torch::autograd::isFwGradDefined(*vector),
                                "forward-mode differentiation through a kernel of a norm");
    TORCH_CHECK_VALUE(here(*vector) && vector->dim() == 1 && vector->size(0) == x.size(-1),
                      "parameters and buffers must be on the CPU and have ", x.size(-1),
                      " entries, got ", vector->sizes(), " on ", vector->device());
  }
  for (const Tensor* counter : counters) {
    TORCH_CHECK_VALUE(here(*counter) && counter->numel() == 1 &&
                          counter->scalar_type() == at::kLong,
                      "counters must be one int64 on the CPU");
  }
}

// T*B or N, the number of rows of x.
inline int64_t num_rows(const Tensor& x) { return x.numel() / std::max<int64_t>(1, x.size(-1)); }

// Raises ValueError unless the mask is (B, T) for x (T, B, C), or (N,) for x (N, C).
inline void check_mask(const Tensor& x, const Tensor& mask) {
  const bool fits = x.dim() == 3 ? mask.dim() == 2 && mask.size(0) == x.size(1) &&
                                       mask.size(1) == x.size(0)
                                 : mask.dim() == 1 && mask.size(0) == x.size(0);
  TORCH_CHECK_VALUE(mask.device().is_cpu() && mask.layout() == at::kStrided &&
                        mask.scalar_type() == at::kBool && fits,
                    "the mask must be bool (B, T) or (N,) on the CPU, got ", mask.sizes());
}

// Which rows of x (T, B, C) with mask (B, T), or of x (N, C) with mask (N,), are padding. A copy in
// the order of the rows, because the caller may write to the mask before backward.
class Padding {
 public:
  // Raises ValueError where the mask does not fit.
  Padding(const Tensor& x, const std::optional<Tensor>& mask) : rows_(num_rows(x)), num_(rows_) {
    if (!mask) return;
    check_mask(x, *mask);
    const bool in_sentences = x.dim() == 3;
    const bool* from = content<bool>(*mask);
    const int64_t times = x.size(0), sentences = in_sentences ? x.size(1) : 1;
    const int64_t time_stride = mask->stride(-1);
    const int64_t sentence_stride = in_sentences ? mask->stride(0) : 0;
    is_padding_.reset(new bool[static_cast<size_t>(rows_)]);
    bool* to = is_padding_.get();
    for (int64_t t = 0; t < times; ++t) {
      for (int64_t b = 0; b < sentences; ++b) {
        num_ -= *to++ = from[t * time_stride + b * sentence_stride];
      }
    }
  }
  bool operator()(int64_t row) const { return is_padding_ && is_padding_[row]; }

  // N, the number of real tokens.
  int64_t num_tokens() const { return num_; }

  // The opposite as a tensor (rows, 1), True = real token.
  Tensor token_mask() const {
    const Tensor mask = allocate({rows_, 1}, at::kBool);
    for (int64_t row = 0; row < rows_; ++row) writable<bool>(mask)[row] = !(*this)(row);
    return mask;
  }

 private:
  int64_t rows_, num_;
  std::unique_ptr<bool[]> is_padding_;
};

// --- Loops over rows

constexpr int64_t kBlockRows = 64;
constexpr int kRowsAtOnce = 4;    // share one load and store of the sums
constexpr int64_t kStrip = 64;    // channels, after which the next rows are fetched
constexpr int64_t kLine = 64;     // bytes
constexpr int64_t kValuesOfAThread = 1 << 14;  // fewer take less time than to wake the thread

// Threads that are worth starting for so many rows.
inline int num_threads(int64_t rows, int64_t channels) {
  const int64_t most = std::min(rows / kBlockRows, rows * channels / kValuesOfAThread);
  if (most <= 1) return 1;
  return static_cast<int>(std::min<int64_t>(most, std::max(1, at::get_num_threads())));
}

// Calls block(thread, first, last) for every block of rows, in order within a thread.
template <class Block>
void over_blocks(int64_t rows, int64_t channels, const Block& block) {
  const int threads = num_threads(rows, channels);
  const auto blocks_of = [&](int64_t thread) {
    for (int64_t first = thread * kBlockRows; first < rows; first += threads * kBlockRows) {
      block(static_cast<int>(thread), first, std::min(rows, first + kBlockRows));
    }
  };
  if (threads == 1) return blocks_of(0);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) blocks_of(thread);
  });
}

// Rows of a block that are computed at once, and the as many that come next.
template <int kRows>
struct Group {
  static constexpr int size = kRows;
  const int64_t* rows;
  const int64_t* next;
};

// Calls body(Group<R>) for the rows of [first, last) for which wanted(row) is true, R at once.
template <class Wanted, class Body>
void in_groups(int64_t first, int64_t last, const Wanted& wanted, const Body& body) {
  int64_t rows[kBlockRows + kRowsAtOnce];
  int64_t count = 0, done = 0;
  for (int64_t row = first; row < last; ++row) {
    rows[count] = row;
    count += wanted(row);
  }
  if (count == 0) return;
  for (int i = 0; i < kRowsAtOnce; ++i) rows[count + i] = rows[count - 1];
  for (; done + kRowsAtOnce <= count; done += kRowsAtOnce) {
    body(Group<kRowsAtOnce>{rows + done, rows + done + kRowsAtOnce});
  }
  for (; done < count; ++done) body(Group<1>{rows + done, rows + done + 1});
}

// Pointers to the rows of a group in the memory at `start`.
template <class T, int kRows>
std::array<T*, kRows> rows_at(T* start, const int64_t* rows, int64_t channels) {
  std::array<T*, kRows> result;
  for (int i = 0; i < kRows; ++i) result[i] = start + rows[i] * channels;
  return result;
}

// Calls body(begin, end) for strips of the channels, and before each fetches that strip of the
// rows in `next`, arrays of pointers, into the cache.
template <class Body, class... Next>
void over_strips(int64_t channels, const Body& body, const Next&... next) {
  for (int64_t begin = 0; begin < channels; begin += kStrip) {
    const int64_t end = std::min(channels, begin + kStrip);
    const auto fetch = [&](const auto& rows) {
      constexpr int64_t kPerLine = kLine / static_cast<int64_t>(sizeof(*rows[0]));
      for (const auto* row : rows) {
        for (int64_t c = begin; c < end; c += kPerLine) __builtin_prefetch(row + c);
      }
    };
    (fetch(next), ...);
    body(begin, end);
  }
}

// Sums per channel over rows. Every thread adds to its own memory.
template <class A>
class Sums {
 public:
  // quantities: how many values per channel are summed.
  Sums(int64_t rows, int quantities, int64_t channels)
      : channels_(channels),
        width_(quantities * channels),
        threads_(num_threads(rows, channels)),
        blocks_(static_cast<size_t>(threads_ * width_)),
        totals_(static_cast<size_t>(rows > kBlockRows ? threads_ * width_ : 0)) {}

  // Where the thread adds the values of its current block: (quantities, C).
  A* block(int thread) { return blocks_.data() + thread * width_; }

  // Adds what the thread's block has gathered to its totals and clears the block.
  void end_block(int thread) {
    if (totals_.empty()) return;  // there is no other block
    A* block = this->block(thread);
    double* total = totals_.data() + thread * width_;
#pragma omp simd
    for (int64_t i = 0; i < width_; ++i) {
      total[i] += block[i];
      block[i] = 0;
    }
  }

  // Writes the sums (C,) of one quantity over all rows.
  void total(int quantity, A* result) const {
    const int64_t offset = quantity * channels_;
    if (totals_.empty()) {
      std::copy_n(blocks_.data() + offset, channels_, result);
      return;
    }
    const double* of_first = totals_.data() + offset;
#pragma omp simd
    for (int64_t c = 0; c < channels_; ++c) {
      double sum = of_first[c];
      for (int thread = 1; thread < threads_; ++thread) sum += of_first[thread * width_ + c];
      result[c] = static_cast<A>(sum);
    }
  }

 private:
  int64_t channels_, width_;
  int threads_;
  std::vector<A> blocks_;
  std::vector<double> totals_;
};

// x as it lies in memory, and what the loops need to know of it.
template <class T>
struct Rows {
  explicit Rows(const Tensor& x)
      : values(content<T>(x)), channels(x.size(-1)), count(num_rows(x)) {}
  const T* values;
  int64_t channels, count;
};

// Sums of term(row, c) over c < size for each of kRows rows: four at once, because one after the
// other each addition would have to wait for the one before. The order of the additions is the
// compiler's choice here and nowhere else.
template <int kRows, class A, class Term>
std::array<A, kRows> sum_for_rows(int64_t size, const Term& term) {
  if constexpr (kRows == 4) {
    A s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t c = 0; c < size; ++c) {
      s0 += term(0, c);
      s1 += term(1, c);
      s2 += term(2, c);
      s3 += term(3, c);
    }
    return {s0, s1, s2, s3};
  } else {
    static_assert(kRows == 1);
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < size; ++c) sum += term(0, c);
    return {sum};
  }
}

// 1 / sqrt(mean of x^2 over a group + eps)
template <int kRows, class T>
void inverse_rms(const T* const* rows, int64_t size, double eps, Accumulator<T>* result) {
  using A = Accumulator<T>;
  const auto sums = sum_for_rows<kRows, A>(size, [&](int i, int64_t c) {
    const A value = load(rows[i][c]);
    return value * value;
  });
  for (int i = 0; i < kRows; ++i) {
    result[i] = 1 / std::sqrt(sums[i] / static_cast<A>(size) + static_cast<A>(eps));
  }
}

// Sums of x^2 over the real tokens.
template <class T>
void sum_squares(const Rows<T>& x, const Padding& padding, Sums<Accumulator<T>>& sums) {
  using A = Accumulator<T>;
  over_blocks(x.count, x.channels, [&](int thread, int64_t first, int64_t last) {
    A* sum_sq = sums.block(thread);
    const auto token = [&](int64_t row) { return !padding(row); };
    in_groups(first, last, token, [&](auto group) {
      constexpr int kRows = decltype(group)::size;
      const auto in = rows_at<const T, kRows>(x.values, group.rows, x.channels);
      const auto next = rows_at<const T, kRows>(x.values, group.next, x.channels);
      over_strips(x.channels, [&](int64_t begin, int64_t end) {
#pragma omp simd
        for (int64_t c = begin; c < end; ++c) {
          A sum = 0;
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            const A value = load(in[r][c]);
            sum += value * value;
          }
          sum_sq[c] += sum;
        }
      }, next);
    });
    sums.end_block(thread);
  });
}

// y = (x - mean) scale + shift at real tokens, zero at padding; with kSum also the sums of x^2.
// mean may be null if kCenter is false, sums if kSum is.
template <bool kSum, bool kCenter, class T>
void scale_tokens(const Rows<T>& x, const Padding& padding, const Accumulator<T>* scale,
                  const Accumulator<T>* shift, const Accumulator<T>* mean, T* y,
                  Sums<Accumulator<T>>* sums) {
  using A = Accumulator<T>;
  over_blocks(x.count, x.channels, [&](int thread, int64_t first, int64_t last) {
    A* sum_sq = kSum ? sums->block(thread) : nullptr;
    const auto token = [&](int64_t row) {
      if (!padding(row)) return true;
      std::memset(static_cast<void*>(y + row * x.channels), 0, x.channels * sizeof(T));
      return false;
    };
    in_groups(first, last, token, [&](auto group) {
      constexpr int kRows = decltype(group)::size;
      const auto in = rows_at<const T, kRows>(x.values, group.rows, x.channels);
      const auto out = rows_at<T, kRows>(y, group.rows, x.channels);
      const auto next = rows_at<const T, kRows>(x.values, group.next, x.channels);
      over_strips(x.channels, [&](int64_t begin, int64_t end) {
#pragma omp simd
        for (int64_t c = begin; c < end; ++c) {
          A sum = 0;
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            const A value = load(in[r][c]);
            if constexpr (kSum) sum += value * value;
            store(out[r][c], (kCenter ? value - mean[c] : value) * scale[c] + shift[c]);
          }
          if constexpr (kSum) sum_sq[c] += sum;
        }
      }, next);
    });
    if constexpr (kSum) sums->end_block(thread);
  });
}

// Sums over the real tokens: quantity 0 of gradient (x - mean), quantity 1 of gradient.
template <bool kCenter, class T>
void sum_products(const Rows<T>& x, const T* gradient, const Padding& padding,
                  const Accumulator<T>* mean, Sums<Accumulator<T>>& sums) {
  using A = Accumulator<T>;
  over_blocks(x.count, x.channels, [&](int thread, int64_t first, int64_t last) {
    A *products = sums.block(thread), *plain = products + x.channels;
    const auto token = [&](int64_t row) { return !padding(row); };
    in_groups(first, last, token, [&](auto group) {
      constexpr int kRows = decltype(group)::size;
      const auto in = rows_at<const T, kRows>(x.values, group.rows, x.channels);
      const auto up = rows_at<const T, kRows>(gradient, group.rows, x.channels);
      const auto next = rows_at<const T, kRows>(x.values, group.next, x.channels);
      const auto next_up = rows_at<const T, kRows>(gradient, group.next, x.channels);
      over_strips(x.channels, [&](int64_t begin, int64_t end) {
#pragma omp simd
        for (int64_t c = begin; c < end; ++c) {
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
      }, next, next_up);
    });
    sums.end_block(thread);
  });
}

// dx = gradient scale + (x - mean) slope + shift at real tokens, zero at padding; with kSum also
// the sums of sum_products. mean and shift may be null if kCenter is false, sums if kSum is.
template <bool kSum, bool kCenter, class T>
void propagate(const Rows<T>& x, const T* gradient, const Padding& padding,
               const Accumulator<T>* scale, const Accumulator<T>* slope,
               const Accumulator<T>* mean, const Accumulator<T>* shift, T* dx,
               Sums<Accumulator<T>>* sums) {
  using A = Accumulator<T>;
  over_blocks(x.count, x.channels, [&](int thread, int64_t first, int64_t last) {
    A* products = kSum ? sums->block(thread) : nullptr;
    A* plain = kSum ? products + x.channels : nullptr;
    const auto token = [&](int64_t row) {
      if (!padding(row)) return true;
      std::memset(static_cast<void*>(dx + row * x.channels), 0, x.channels * sizeof(T));
      return false;
    };
    in_groups(first, last, token, [&](auto group) {
      constexpr int kRows = decltype(group)::size;
      const auto in = rows_at<const T, kRows>(x.values, group.rows, x.channels);
      const auto up = rows_at<const T, kRows>(gradient, group.rows, x.channels);
      const auto out = rows_at<T, kRows>(dx, group.rows, x.channels);
      const auto next = rows_at<const T, kRows>(x.values, group.next, x.channels);
      const auto next_up = rows_at<const T, kRows>(gradient, group.next, x.channels);
      over_strips(x.channels, [&](int64_t begin, int64_t end) {
#pragma omp simd
        for (int64_t c = begin; c < end; ++c) {
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
      }, next, next_up);
    });
    if constexpr (kSum) sums->end_block(thread);
  });
}

// --- State

// Whether all values are finite in the type of a buffer, float or double.
template <class A>
bool all_finite(const A* values, int64_t channels, const Tensor& buffer) {
  constexpr A kLargestFloat = std::numeric_limits<float>::max();
  const A largest =
      buffer.scalar_type() == at::kDouble ? std::numeric_limits<A>::max() : kLargestFloat;
  int beyond = 0;
#pragma omp simd reduction(| : beyond)
  for (int64_t c = 0; c < channels; ++c) beyond |= !(std::abs(values[c]) <= largest);
  return !beyond;
}

// Whether a batch of n real tokens may change the state; counts it in num_rejected where only its
// statistics are at fault. As RunningNorm._is_finite_batch.
inline bool is_usable(int64_t n, bool finite, const Tensor& num_rejected) {
  if (n > 0 && !finite) *writable<int64_t>(num_rejected) += 1;
  return n > 0 && finite;
}

// Counts the version of a buffer up, as torch's own writing does, so that autograd notices.
inline void count_version(const Tensor& buffer) {
  buffer.unsafeGetTensorImpl()->bump_version();
}

// Calls body(values) with the values of a buffer, float or double, to be written.
template <class Body>
void with_buffer(const Tensor& buffer, const Body& body) {
  TORCH_CHECK_VALUE(buffer.is_contiguous(), "buffers must be contiguous");
  if (buffer.scalar_type() == at::kFloat) return body(writable<float>(buffer));
  TORCH_CHECK_VALUE(buffer.scalar_type() == at::kDouble, "buffers must be float32 or float64");
  body(writable<double>(buffer));
}

// buffer (C,) <- next(c, before), if a batch of n real tokens may change it.
template <class Next>
void advance(const Tensor& buffer, int64_t n, const Tensor& num_rejected, const Next& next) {
  with_buffer(buffer, [&](auto* values) {
    using B = std::remove_pointer_t<decltype(values)>;
    const int64_t channels = buffer.numel();
    const Vectors<B> after(1, channels);
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) after[0][c] = next(c, values[c]);
    if (!is_usable(n, all_finite(after[0], channels, buffer), num_rejected)) return;
    std::copy_n(after[0], channels, values);
    count_version(buffer);
  });
}

// step <- step + 1
inline void count_step(const Tensor& step) {
  *writable<int64_t>(step) += 1;
  count_version(step);
}

// (1 - update_rate) before + update_rate value, exact at both ends as torch.lerp is
template <class B>
B lerp(B before, B value, B update_rate) {
  const B apart = value - before;
  return update_rate < B(0.5) ? before + update_rate * apart : value - (1 - update_rate) * apart;
}

// running (C,) <- (1 - update_rate) running + update_rate value factor
template <class A>
void average(const Tensor& running, const A* value, double update_rate, double factor = 1) {
  with_buffer(running, [&](auto* values) {
    using B = std::remove_pointer_t<decltype(values)>;
    const int64_t channels = running.numel();
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const B scaled = static_cast<B>(value[c]) * static_cast<B>(factor);
      values[c] = lerp(values[c], scaled, static_cast<B>(update_rate));
    }
  });
  count_version(running);
}

// What a forward saves for its repetition by activation checkpointing: two vectors (C,) and some
// numbers, as one tensor of doubles.
template <class A>
Tensor pack(const A* first, const A* second, int64_t channels,
            std::initializer_list<double> numbers) {
  const Tensor packed =
      allocate({2 * channels + static_cast<int64_t>(numbers.size())}, at::kDouble);
  double* to = writable<double>(packed);
  to = std::copy_n(first, channels, to);
  to = std::copy_n(second, channels, to);
  std::copy(numbers.begin(), numbers.end(), to);
  return packed;
}

// The inverse of `pack`: writes the vectors and returns the numbers, of which there are `count`.
template <class A>
const double* unpack(const Tensor& packed, int64_t channels, A* first, A* second, int count) {
  TORCH_CHECK_VALUE(packed.scalar_type() == at::kDouble && packed.is_contiguous() &&
                        packed.numel() == 2 * channels + count,
                    "not what a forward saved");
  const double* from = content<double>(packed);
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    first[c] = static_cast<A>(from[c]);
    second[c] = static_cast<A>(from[channels + c]);
  }
  return from + 2 * channels;
}

// --- Autograd

// A new node of the graph. Which pointer holds it depends on the version of torch.
template <class Node>
auto make_node() {
  using Pointer = decltype(torch::autograd::Edge::function);
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return std::shared_ptr<Node>(new Node, [](Node* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<Node>();
  }
}

// The backward of a step: x and the weight, which autograd saves, and what the layer keeps.
//
// Layer has `static constexpr const char* name` and
// `variable_list backward(const Tensor& x, const Tensor& weight, variable_list gradients)`, which
// gets x contiguous and the gradients of all outputs, undefined where there is none, and returns
// those of x, weight and bias.
template <class Layer>
class Step final : public torch::autograd::Node {
 public:
  torch::autograd::SavedVariable x, weight;
  std::optional<Layer> layer;

  variable_list apply(variable_list&& gradients) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    // Raises where the graph has been freed. Hooks on saved tensors may have changed strides.
    const Tensor of_x = x.unpack().contiguous(), of_weight = weight.unpack();
    return layer->backward(of_x, of_weight, std::move(gradients));
  }
  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    x.reset_data();
    weight.reset_data();
    layer.reset();
  }
  std::string name() const override { return Layer::name; }
};

// Makes outputs of a forward depend on x, weight and bias, which may be undefined, by
// layer.backward, where autograd records.
template <class Layer>
void record(const Tensor& x, const Tensor& weight, const Tensor& bias,
            std::initializer_list<Tensor*> outputs, Layer&& layer) {
  if (!at::GradMode::is_enabled() ||
      !(x.requires_grad() || weight.requires_grad() || (bias.defined() && bias.requires_grad()))) {
    return;
  }
  const auto node = make_node<Step<std::decay_t<Layer>>>();
  torch::autograd::edge_list edges;
  edges.reserve(3);
  for (const Tensor* input : {&x, &weight, &bias}) {
    if (input->defined()) {
      edges.push_back(torch::autograd::impl::gradient_edge(*input));
    } else {
      edges.emplace_back();
    }
  }
  node->set_next_edges(std::move(edges));
  node->x = torch::autograd::SavedVariable(x, /*is_output=*/false);
  node->weight = torch::autograd::SavedVariable(weight, /*is_output=*/false);
  node->layer.emplace(std::forward<Layer>(layer));
  for (Tensor* output : outputs) torch::autograd::create_gradient_edge(*output, node);
}

// dL/dy, contiguous; zeros where nothing depends on y.
inline Tensor dense(const Tensor& gradient, const Tensor& x) {
  return gradient.defined() ? gradient.contiguous() : at::zeros_like(x);
}

// Makes differentiating these gradients an error, as torch's once_differentiable does in Python.
inline variable_list once_differentiable(variable_list gradients) {
  if (!at::GradMode::is_enabled()) return gradients;
  for (Tensor& gradient : gradients) gradient.set_requires_grad(true);  // or there is no error
  torch::autograd::DelayedError refuse(
      "trying to differentiate twice a normalization whose backward is not the derivative of its "
      "forward (once_differentiable)",
      static_cast<int64_t>(gradients.size()));
  return refuse(std::move(gradients));
}

}  // namespace normexp
