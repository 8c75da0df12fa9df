// What a Transformer's sublayers do between their matrix products: operators of sublayers.py.
//
// A batch of hidden states (T, B, C) has M = T B places. Its rows are the tokens that are computed,
// N of them, at the places rows[i], followed by rows of zeros that round their number up. slots[m]
// is the row of place m, or -1. Products read and write rows in the narrow type (bfloat16 under
// autocast); the states themselves are in the wide one.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "attention.h"
#include "bfloat16.h"
#include "draws.h"

namespace {

constexpr int64_t kGrain = 64;  // rows that one thread takes at least

template <typename N>
using Wide = std::conditional_t<std::is_same_v<N, double>, double, float>;

template <typename N>
N* data(const at::Tensor& tensor) {
  return static_cast<N*>(tensor.data_ptr());
}

// Call f with a null pointer to the element type of a narrow tensor.
template <typename F>
void with_type(at::ScalarType type, F f) {
  if (type == at::kBFloat16) {
    f(static_cast<Bf16*>(nullptr));
  } else if (type == at::kFloat) {
    f(static_cast<float*>(nullptr));
  } else {
    TORCH_CHECK(type == at::kDouble, "sublayers: float32, float64 or bfloat16 only");
    f(static_cast<double*>(nullptr));
  }
}

at::ScalarType wide_type(at::ScalarType narrow) {
  return narrow == at::kDouble ? at::kDouble : at::kFloat;
}

void check_rows(const at::Tensor& rows, at::ScalarType narrow) {
  TORCH_CHECK(rows.dim() == 2 && rows.stride(1) == 1 && rows.scalar_type() == narrow,
              "sublayers: rows must be (N, C) of one type, their elements side by side");
}

void check_places(const at::Tensor& states, at::ScalarType narrow) {
  TORCH_CHECK(states.is_cpu() && states.is_contiguous() && states.scalar_type() == wide_type(narrow),
              "sublayers: states must be contiguous, on the CPU, of the wide type");
}

const int32_t* indices(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.scalar_type() == at::kInt && tensor.is_contiguous(),
              "sublayers: indices must be contiguous int32");
  return tensor.data_ptr<int32_t>();
}

Mask mask_of(int64_t threshold, int64_t key, int64_t stream) {
  TORCH_CHECK(0 <= threshold && threshold < 65536, "sublayers: threshold must be in [0, 65536)");
  return {static_cast<uint16_t>(threshold), static_cast<uint64_t>(key),
          static_cast<uint64_t>(stream)};
}

template <typename T>
T times(T x, T factor) {
  return factor == T(0) ? T(0) : x * factor;  // also of infinities
}

// Rows (total, C) of states (M, C), dropped by a mask over the states.
at::Tensor take_rows(const at::Tensor& states, const at::Tensor& rows, int64_t total,
                     at::ScalarType narrow, int64_t threshold, int64_t key, int64_t stream) {
  check_places(states, narrow);
  int64_t width = states.size(-1), count = rows.numel();
  const int32_t* places = indices(rows);
  Mask mask = mask_of(threshold, key, stream);
  at::Tensor taken = at::empty({total, width}, states.options().dtype(narrow));
  with_type(narrow, [&](auto* type) {
    using N = std::remove_pointer_t<decltype(type)>;
    using T = Wide<N>;
    const T* from = data<T>(states);
    N* to = data<N>(taken);
    at::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
      MaskReader reader(mask);
      std::vector<T> factors(width);
      for (int64_t r = begin; r < end; ++r) {
        N* row = to + r * width;
        if (r >= count) {
          for (int64_t c = 0; c < width; ++c) store(row[c], T(0));
          continue;
        }
        const T* state = from + places[r] * width;
        if (mask.threshold == 0) {
          for (int64_t c = 0; c < width; ++c) store(row[c], state[c]);
          continue;
        }
        reader.read(places[r] * width, width, factors.data());
        for (int64_t c = 0; c < width; ++c) store(row[c], times(state[c], factors[c]));
      }
    });
  });
  return taken;
}

// States like `shape`: rows, dropped by a mask over the states, at their places, zero elsewhere;
// added to `residual` if there is one.
at::Tensor put_rows(const at::Tensor& rows, const at::Tensor& slots, at::IntArrayRef shape,
                    const std::optional<at::Tensor>& residual, int64_t threshold, int64_t key,
                    int64_t stream) {
  at::ScalarType narrow = rows.scalar_type();
  check_rows(rows, narrow);
  int64_t width = rows.size(1), down = rows.stride(0), count = slots.numel();
  const int32_t* slot = indices(slots);
  Mask mask = mask_of(threshold, key, stream);
  at::Tensor states = at::empty(shape, rows.options().dtype(wide_type(narrow)));
  TORCH_CHECK(states.numel() == count * width, "sublayers: as many states as slots");
  if (residual) check_places(*residual, narrow);
  with_type(narrow, [&](auto* type) {
    using N = std::remove_pointer_t<decltype(type)>;
    using T = Wide<N>;
    const N* from = data<N>(rows);
    const T* added = residual ? data<T>(*residual) : nullptr;
    T* to = data<T>(states);
    at::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
      MaskReader reader(mask);
      std::vector<T> factors(width), zeros(width);
      for (int64_t m = begin; m < end; ++m) {
        T* state = to + m * width;
        const T* base = added ? added + m * width : zeros.data();
        if (slot[m] < 0) {
          std::copy(base, base + width, state);
          continue;
        }
        const N* row = from + slot[m] * down;
        if (mask.threshold == 0) {
          for (int64_t c = 0; c < width; ++c) state[c] = base[c] + load(row[c]);
          continue;
        }
        reader.read(m * width, width, factors.data());
        for (int64_t c = 0; c < width; ++c) state[c] = base[c] + times(load(row[c]), factors[c]);
      }
    });
  });
  return states;
}

// In place: rows become max(rows, 0), dropped by a mask over the states (M, C).
void relu_dropped_(at::Tensor& values, const at::Tensor& rows, int64_t threshold, int64_t key,
                   int64_t stream) {
  at::ScalarType narrow = values.scalar_type();
  check_rows(values, narrow);
  int64_t width = values.size(1);
  const int32_t* places = indices(rows);
  Mask mask = mask_of(threshold, key, stream);
  with_type(narrow, [&](auto* type) {
    using N = std::remove_pointer_t<decltype(type)>;
    using T = Wide<N>;
    N* value = data<N>(values);
    at::parallel_for(0, rows.numel(), kGrain, [&](int64_t begin, int64_t end) {
      MaskReader reader(mask);
      std::vector<T> factors(width);
      for (int64_t r = begin; r < end; ++r) {
        reader.read(places[r] * width, width, factors.data());
        N* row = value + r * width;
        for (int64_t c = 0; c < width; ++c) {
          T x = load(row[c]);
          store(row[c], x < T(0) ? T(0) : times(x, factors[c]));
        }
      }
    });
  });
}

// In place: the gradient of what `relu_dropped_` left becomes that of what it was given.
void relu_dropped_backward_(at::Tensor& gradient, const at::Tensor& left, int64_t threshold) {
  at::ScalarType narrow = gradient.scalar_type();
  TORCH_CHECK(gradient.is_contiguous() && left.is_contiguous() && left.scalar_type() == narrow &&
                  left.sizes() == gradient.sizes(),
              "sublayers: gradient and values must be alike");
  double scale = mask_of(threshold, 0, 0).scale();
  with_type(narrow, [&](auto* type) {
    using N = std::remove_pointer_t<decltype(type)>;
    using T = Wide<N>;
    N* to = data<N>(gradient);
    const N* from = data<N>(left);
    at::parallel_for(0, gradient.numel(), 1 << 14, [=](int64_t begin, int64_t end) {
      N* __restrict by = to;
      const N* __restrict value = from;
      T factor = static_cast<T>(scale);
      for (int64_t i = begin; i < end; ++i) {
        T kept = load(value[i]) != T(0) ? factor : T(0);
        store(by[i], times(load(by[i]), kept));
      }
    });
  });
}

// Sums (C,) over rows (N, C), in the wide type.
at::Tensor sum_of_rows(const at::Tensor& rows) {
  at::ScalarType narrow = rows.scalar_type();
  check_rows(rows, narrow);
  int64_t count = rows.size(0), width = rows.size(1), down = rows.stride(0);
  at::Tensor sums = at::zeros({width}, rows.options().dtype(wide_type(narrow)));
  with_type(narrow, [&](auto* type) {
    using N = std::remove_pointer_t<decltype(type)>;
    using T = Wide<N>;
    const N* from = data<N>(rows);
    T* to = data<T>(sums);
    at::parallel_for(0, width, 64, [=](int64_t begin, int64_t end) {
      std::vector<T> of_block(end - begin);
      for (int64_t first = 0; first < count; first += kGrain) {  // in blocks: less rounding
        std::fill(of_block.begin(), of_block.end(), T(0));
        for (int64_t r = first; r < std::min(first + kGrain, count); ++r) {
          T* __restrict sum = of_block.data();
          const N* __restrict row = from + r * down + begin;
          for (int64_t c = 0; c < end - begin; ++c) sum[c] += load(row[c]);
        }
        for (int64_t c = begin; c < end; ++c) to[c] += of_block[c - begin];
      }
    });
  });
  return sums;
}

// The arguments of `attend` and `attend_backward` as the kernels take them.
template <typename N>
Attention<N, Wide<N>> attention_of(const at::Tensor& queries, const at::Tensor& keys,
                                   const at::Tensor& values, const at::Tensor& query_slots,
                                   const at::Tensor& key_slots, const at::Tensor& denominators,
                                   const std::optional<at::Tensor>& bias, double scale,
                                   const Mask& mask) {
  using T = Wide<N>;
  int64_t sentences = denominators.size(0), length = denominators.size(2);
  int64_t heads = denominators.size(1), keys_length = key_slots.numel() / sentences;
  TORCH_CHECK(query_slots.numel() == sentences * length, "attend: as many slots as queries");
  if (bias) {
    TORCH_CHECK(bias->stride(-1) == 1 && bias->scalar_type() == denominators.scalar_type() &&
                    bias->dim() == 2 && bias->size(0) == length && bias->size(1) == keys_length,
                "attend: bias must be (T, S) of the wide type, its columns side by side");
  }
  const int32_t *of_queries = indices(query_slots), *of_keys = indices(key_slots);
  return {{data<N>(queries), queries.stride(0), of_queries, length, sentences},
          {data<N>(keys), keys.stride(0), of_keys, keys_length, sentences},
          {data<N>(values), values.stride(0), of_keys, keys_length, sentences},
          data<T>(denominators),
          bias ? data<T>(*bias) : nullptr,
          bias ? bias->stride(0) : 0,
          heads,
          queries.size(1) / heads,
          static_cast<T>(scale),
          mask};
}

// Attention's outputs (total, C), rows of the queries, and the logarithms of the softmax's
// denominators (B, H, T).
std::tuple<at::Tensor, at::Tensor> attend(const at::Tensor& queries, const at::Tensor& keys,
                                          const at::Tensor& values, const at::Tensor& query_slots,
                                          const at::Tensor& key_slots, int64_t sentences,
                                          int64_t heads, double scale,
                                          const std::optional<at::Tensor>& bias,
                                          int64_t threshold, int64_t key, int64_t stream) {
  at::ScalarType narrow = queries.scalar_type();
  for (const at::Tensor& rows : {queries, keys, values}) check_rows(rows, narrow);
  at::Tensor out = at::zeros({queries.size(0), queries.size(1)}, queries.options());
  at::Tensor denominators = at::empty({sentences, heads, query_slots.numel() / sentences},
                                      queries.options().dtype(wide_type(narrow)));
  Mask mask = mask_of(threshold, key, stream);
  with_type(narrow, [&](auto* type) {
    using N = std::remove_pointer_t<decltype(type)>;
    auto all = attention_of<N>(queries, keys, values, query_slots, key_slots, denominators, bias,
                               scale, mask);
    Tokens<N> to = all.queries;
    to.data = data<N>(out);
    to.row = out.stride(0);
    at::parallel_for(0, sentences * heads, 4, [&](int64_t begin, int64_t end) {
      Head<N, Wide<N>> head(all);
      for (int64_t i = begin; i < end; ++i) head.forward(i / heads, i % heads, to);
    });
  });
  return {out, denominators};
}

// Fill the gradients of queries, keys and values, which may be columns of one tensor.
void attend_backward(const at::Tensor& by_out, const at::Tensor& queries, const at::Tensor& keys,
                     const at::Tensor& values, at::Tensor& by_queries, at::Tensor& by_keys,
                     at::Tensor& by_values, const at::Tensor& query_slots,
                     const at::Tensor& key_slots, const at::Tensor& denominators, double scale,
                     const std::optional<at::Tensor>& bias, int64_t threshold, int64_t key,
                     int64_t stream) {
  at::ScalarType narrow = queries.scalar_type();
  for (const at::Tensor& rows : {by_out, queries, keys, values, by_queries, by_keys, by_values}) {
    check_rows(rows, narrow);
  }
  int64_t heads = denominators.size(1);
  Mask mask = mask_of(threshold, key, stream);
  with_type(narrow, [&](auto* type) {
    using N = std::remove_pointer_t<decltype(type)>;
    auto all = attention_of<N>(queries, keys, values, query_slots, key_slots, denominators, bias,
                               scale, mask);
    auto like = [](Tokens<N> tokens, const at::Tensor& rows) {
      tokens.data = data<N>(rows);
      tokens.row = rows.stride(0);
      return tokens;
    };
    Tokens<N> by_o = like(all.queries, by_out), by_q = like(all.queries, by_queries);
    Tokens<N> by_k = like(all.keys, by_keys), by_v = like(all.values, by_values);
    at::parallel_for(0, denominators.size(0) * heads, 4, [&](int64_t begin, int64_t end) {
      Head<N, Wide<N>> head(all);
      for (int64_t i = begin; i < end; ++i) {
        head.backward(i / heads, i % heads, by_o, by_q, by_k, by_v);
      }
    });
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(normexp, m) {
  m.def(
      "take_rows(Tensor states, Tensor rows, int total, ScalarType narrow, int threshold, int key, "
      "int stream) -> Tensor",
      &take_rows);
  m.def(
      "put_rows(Tensor rows, Tensor slots, int[] shape, Tensor? residual, int threshold, int key, "
      "int stream) -> Tensor",
      &put_rows);
  m.def("relu_dropped_(Tensor(a!) values, Tensor rows, int threshold, int key, int stream) -> ()",
        &relu_dropped_);
  m.def("relu_dropped_backward_(Tensor(a!) gradient, Tensor left, int threshold) -> ()",
        &relu_dropped_backward_);
  m.def("sum_of_rows(Tensor rows) -> Tensor", &sum_of_rows);
  m.def(
      "attend(Tensor queries, Tensor keys, Tensor values, Tensor query_slots, Tensor key_slots, "
      "int sentences, int heads, float scale, Tensor? bias, int threshold, int key, int stream) -> "
      "(Tensor, Tensor)",
      &attend);
  m.def(
      "attend_backward(Tensor by_out, Tensor queries, Tensor keys, Tensor values, "
      "Tensor(a!) by_queries, Tensor(b!) by_keys, Tensor(c!) by_values, Tensor query_slots, "
      "Tensor key_slots, Tensor denominators, float scale, Tensor? bias, int threshold, int key, "
      "int stream) -> ()",
      &attend_backward);
}
