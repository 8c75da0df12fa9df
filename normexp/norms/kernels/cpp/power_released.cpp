// PN as released: one step of training, forward and backward. Equations and rules of the state:
// normexp/norms/power_released.py (also the plain implementation), running_norm.py.
#include "rows.h"

namespace normexp {
namespace {

struct Options {
  int64_t groups;
  double eps, alpha_fwd, alpha_bwd;
  int64_t warmup_steps;
};

struct State {
  const Tensor &running, &e, &step, &num_rejected;
};

// What a forward returns for its repetition, which passes `saved` again: psi2, psi2_batch, whether
// psi2 is psi2_batch, n.
struct Memory {
  Tensor sum_sq, saved;
};

// Calls body(group, sums) for all rows of all blocks, real tokens and padding apart, each with the
// sums of its kind: quantity 0 for real tokens, 1 for padding.
template <class T, class Body>
void by_kind(const Rows<T>& x, const Padding& padding, Sums<Accumulator<T>>& sums,
             const Body& body) {
  over_blocks(x.count, x.channels, [&](int thread, int64_t first, int64_t last) {
    Accumulator<T>* block = sums.block(thread);
    in_groups(first, last, [&](int64_t row) { return !padding(row); },
              [&](auto group) { body(group, block); });
    in_groups(first, last, [&](int64_t row) { return padding(row); },
              [&](auto group) { body(group, block + x.channels); });
    sums.end_block(thread);
  });
}

// Sums of xg^2, xg = x r, real tokens and padding apart; writes r (rows, groups).
template <class T>
void sum_scaled_squares(const Rows<T>& x, const Padding& padding, const Options& options,
                        Accumulator<T>* r, Sums<Accumulator<T>>& sums) {
  using A = Accumulator<T>;
  const int64_t groups = options.groups, size = x.channels / groups;
  by_kind(x, padding, sums, [&](auto rows, A* sum_sq) {
    constexpr int kRows = decltype(rows)::size;
    for (int64_t group = 0; group < groups; ++group) {
      const auto in = rows_at<const T, kRows>(x.values + group * size, rows.rows, x.channels);
      A factor[kRows];
      inverse_rms<kRows>(in.data(), size, options.eps, factor);
      for (int i = 0; i < kRows; ++i) r[rows.rows[i] * groups + group] = factor[i];
      A* sums_of_group = sum_sq + group * size;
#pragma omp simd
      for (int64_t c = 0; c < size; ++c) {
        A sum = 0;
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
          const A value = load(in[i][c]) * factor[i];
          sum += value * value;
        }
        sums_of_group[c] += sum;
      }
    }
  });
}

// y = x r scale + shift at all positions. With kSum writes r and sums xg^2, else reads r.
template <bool kSum, class T>
void scale_groups(const Rows<T>& x, const Padding& padding, const Options& options,
                  const Accumulator<T>* scale_of, const Accumulator<T>* shift_of, T* y,
                  Accumulator<T>* r, Sums<Accumulator<T>>& sums) {
  using A = Accumulator<T>;
  const int64_t groups = options.groups, size = x.channels / groups;
  by_kind(x, padding, sums, [&](auto rows, A* sum_sq) {
    constexpr int kRows = decltype(rows)::size;
    for (int64_t group = 0; group < groups; ++group) {
      const auto in = rows_at<const T, kRows>(x.values + group * size, rows.rows, x.channels);
      const auto out = rows_at<T, kRows>(y + group * size, rows.rows, x.channels);
      A factor[kRows];
      if constexpr (kSum) {
        inverse_rms<kRows>(in.data(), size, options.eps, factor);
        for (int i = 0; i < kRows; ++i) r[rows.rows[i] * groups + group] = factor[i];
      } else {
        for (int i = 0; i < kRows; ++i) factor[i] = r[rows.rows[i] * groups + group];
      }
      const A *scale = scale_of + group * size, *shift = shift_of + group * size;
      A* sums_of_group = sum_sq + group * size;
#pragma omp simd
      for (int64_t c = 0; c < size; ++c) {
        A sum = 0;
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
          const A value = load(in[i][c]) * factor[i];
          if constexpr (kSum) sum += value * value;
          store(out[i][c], value * scale[c] + shift[c]);
        }
        if constexpr (kSum) sums_of_group[c] += sum;
      }
    }
  });
}

// With xg = x r and d = gradient scale + xg slope: dx = r (d - xg mean_group(d xg)), at padding
// too. Sums: quantity 0 of gradient xg, 1 of gradient.
template <class T>
void propagate_groups(const Rows<T>& x, const T* gradient, int64_t groups,
                      const Accumulator<T>* r, const Accumulator<T>* scale_of,
                      const Accumulator<T>* slope_of, T* dx, Sums<Accumulator<T>>& sums) {
  using A = Accumulator<T>;
  const int64_t size = x.channels / groups;
  over_blocks(x.count, x.channels, [&](int thread, int64_t first, int64_t last) {
    A* block = sums.block(thread);
    const auto all = [](int64_t) { return true; };
    in_groups(first, last, all, [&](auto rows) {
      constexpr int kRows = decltype(rows)::size;
      for (int64_t group = 0; group < groups; ++group) {
        const auto in = rows_at<const T, kRows>(x.values + group * size, rows.rows, x.channels);
        const auto up = rows_at<const T, kRows>(gradient + group * size, rows.rows, x.channels);
        const auto out = rows_at<T, kRows>(dx + group * size, rows.rows, x.channels);
        A factor[kRows], mean[kRows];
        for (int i = 0; i < kRows; ++i) factor[i] = r[rows.rows[i] * groups + group];
        const A *scale = scale_of + group * size, *slope = slope_of + group * size;
        const auto dots = sum_for_rows<kRows, A>(size, [&](int i, int64_t c) {
          const A value = load(in[i][c]) * factor[i];
          return (load(up[i][c]) * scale[c] + value * slope[c]) * value;
        });
        for (int i = 0; i < kRows; ++i) mean[i] = dots[i] / static_cast<A>(size);
        A *products = block + group * size, *plain = products + x.channels;
#pragma omp simd
        for (int64_t c = 0; c < size; ++c) {
          A product = 0, sum = 0;
#pragma GCC unroll 4
          for (int i = 0; i < kRows; ++i) {
            const A g = load(up[i][c]), value = load(in[i][c]) * factor[i];
            product += g * value;
            sum += g;
            const A d = g * scale[c] + value * slope[c];
            store(out[i][c], (d - value * mean[i]) * factor[i]);
          }
          products[c] += product;
          plain[c] += sum;
        }
      }
    });
    sums.end_block(thread);
  });
}

// The backward of PN as released.
template <class T>
struct Released {
  using A = Accumulator<T>;
  static constexpr const char* name = "PowerNormReleasedBackward";

  Options options;
  int64_t n;
  std::unique_ptr<A[]> r;  // (rows, groups)
  Vectors<A> kept;         // inverse, batch_inverse, sums of xg^2 over all positions
  Tensor e, num_rejected;

  variable_list backward(const Tensor& of_x, const Tensor& weight, variable_list gradients) {
    const Tensor gradient = dense(gradients[0], of_x), dx = allocate_like(of_x);
    const Rows<T> x(of_x);
    const Values<A> w(weight), e_before(e);
    const int64_t channels = x.channels;
    const Vectors<A> work(5, channels);
    A *scale = work[0], *slope = work[1], *factor = work[2], *dw = work[3], *db = work[4];
    const A *inverse = kept[0], *batch_inverse = kept[1], *sum_sq = kept[2];
    const A share = static_cast<A>(n > 0 ? 1 - options.alpha_bwd : 0);
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      factor[c] = e_before[c] * share;
      scale[c] = w[c] * batch_inverse[c];
      slope[c] = -factor[c] * inverse[c] * batch_inverse[c];
    }
    Sums<A> sums(x.count, 2, channels);
    propagate_groups(x, content<T>(gradient), options.groups, r.get(), scale, slope,
                     writable<T>(dx), sums);
    sums.total(0, dw);
    sums.total(1, db);
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) dw[c] *= inverse[c];
    const A positions = static_cast<A>(std::max<int64_t>(x.count, 1));
    advance(e, n, num_rejected, [&](int64_t c, auto before) {
      const A x_hat_squares = sum_sq[c] * inverse[c] * inverse[c];
      return before + (dw[c] * w[c] - factor[c] * x_hat_squares) / positions;
    });
    const auto type = weight.scalar_type();
    return once_differentiable({dx, make(dw, channels, type), make(db, channels, type)});
  }
};

// x -> y of PN as released; advances the state unless the forward repeats another one, which it
// knows by what that one saved.
template <class T>
Tensor forward(const Tensor& of_x, const std::optional<Tensor>& mask, const Tensor& weight,
               const Tensor& bias, const State& state, const Options& options,
               const std::optional<Tensor>& replayed, Memory* memory) {
  using A = Accumulator<T>;
  const Rows<T> x(of_x);
  const Padding padding(of_x, mask);
  const int64_t channels = x.channels, n = padding.num_tokens();
  Tensor y = allocate_like(of_x);
  const Values<A> w(weight), b(bias), running(state.running);
  std::unique_ptr<A[]> r(new A[static_cast<size_t>(x.count * options.groups)]);
  Vectors<A> kept(3, channels);
  const Vectors<A> work(3, channels);
  A *inverse = kept[0], *batch_inverse = kept[1], *sum_sq = kept[2];
  A *scale = work[0], *psi2 = work[1], *psi2_batch = work[2];
  const int64_t s = *content<int64_t>(state.step) + 1;
  bool by_batch = s <= options.warmup_steps;
  if (replayed) {
    by_batch = unpack(*replayed, channels, psi2, psi2_batch, 2)[0] != 0;
  } else {
    std::copy_n(running.data(), channels, psi2);
    std::copy_n(running.data(), channels, psi2_batch);  // where there is no token
  }
  const auto invert = [&](const A* values, A* result) {
    const A eps = static_cast<A>(options.eps);
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) result[c] = 1 / std::sqrt(values[c] + eps);
  };
  Sums<A> sums(x.count, 2, channels);
  const auto finish = [&] {
    sums.total(0, sum_sq);
    if (memory) memory->sum_sq = make(sum_sq, channels, scalar_type<A>());
    if (n > 0 && !replayed) {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) psi2_batch[c] = sum_sq[c] / static_cast<A>(n);
    }
    sums.total(1, scale);  // of padding
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) sum_sq[c] += scale[c];
  };
  const auto prepare = [&] {
    invert(psi2, inverse);
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) scale[c] = inverse[c] * w[c];
  };
  T* to = writable<T>(y);
  if (by_batch) {
    sum_scaled_squares(x, padding, options, r.get(), sums);
    finish();
    if (!replayed) std::copy_n(psi2_batch, channels, psi2);
    prepare();
    scale_groups<false>(x, padding, options, scale, b.data(), to, r.get(), sums);
  } else {
    prepare();
    scale_groups<true>(x, padding, options, scale, b.data(), to, r.get(), sums);
    finish();
  }
  invert(psi2_batch, batch_inverse);
  if (memory) memory->saved = pack(psi2, psi2_batch, channels, {double(by_batch), double(n)});
  if (!replayed &&
      is_usable(n, all_finite(psi2_batch, channels, state.running), state.num_rejected)) {
    with_buffer(state.running, [&](auto* values) {
      using B = std::remove_pointer_t<decltype(values)>;
      const B step = static_cast<B>(s), update_rate = static_cast<B>(1 - options.alpha_fwd);
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        const B value = static_cast<B>(psi2_batch[c]);
        B next = values[c];
        if (s < options.warmup_steps) next = (next * (step - 1) + value) / step;
        values[c] = lerp(next, value, update_rate);
      }
    });
    count_version(state.running);
    count_step(state.step);
  }
  record(of_x, weight, bias, {&y},
         Released<T>{options, n, std::move(r), std::move(kept), state.e, state.num_rejected});
  return y;
}

Tensor dispatch(const Tensor& x, const std::optional<Tensor>& mask, const Tensor& weight,
                const Tensor& bias, const State& state, const Options& options,
                const std::optional<Tensor>& replayed, Memory* memory) {
  check(x, {&weight, &bias, &state.running, &state.e}, {&state.step, &state.num_rejected});
  return by_type(x, [&](auto* null) {
    return forward<std::remove_pointer_t<decltype(null)>>(x, mask, weight, bias, state, options,
                                                          replayed, memory);
  });
}

// One iteration of PN as released. Returns y; the sums of xg^2 (C,) over the real tokens, by which
// a forward that repeats this one is recognised; and what this one saved, which the repeated one
// passes as `replayed`.
std::tuple<Tensor, Tensor, Tensor> power_released(
    const Tensor& x, const std::optional<Tensor>& mask, const Tensor& weight, const Tensor& bias,
    const Tensor& running_psi2, const Tensor& e, const Tensor& step, const Tensor& num_rejected,
    const std::optional<Tensor>& replayed, int64_t groups, double eps, double alpha_fwd,
    double alpha_bwd, int64_t warmup_steps) {
  Memory memory;
  const Tensor y =
      dispatch(x, mask, weight, bias, {running_psi2, e, step, num_rejected},
               {groups, eps, alpha_fwd, alpha_bwd, warmup_steps}, replayed, &memory);
  return {y, memory.sum_sq, memory.saved};
}

// The same for a forward that is not repeated and repeats none. Returns y.
Tensor power_released_once(const Tensor& x, const std::optional<Tensor>& mask,
                           const Tensor& weight, const Tensor& bias, const Tensor& running_psi2,
                           const Tensor& e, const Tensor& step, const Tensor& num_rejected,
                           int64_t groups, double eps, double alpha_fwd, double alpha_bwd,
                           int64_t warmup_steps) {
  return dispatch(x, mask, weight, bias, {running_psi2, e, step, num_rejected},
                  {groups, eps, alpha_fwd, alpha_bwd, warmup_steps}, std::nullopt, nullptr);
}

TORCH_LIBRARY_FRAGMENT(normexp, library) {
  library.def(
      "power_released(Tensor x, Tensor? mask, Tensor weight, Tensor bias, "
      "Tensor(a!) running_psi2, Tensor(b!) e, Tensor(c!) step, Tensor(d!) num_rejected, "
      "Tensor? replayed, int groups, float eps, float alpha_fwd, float alpha_bwd, "
      "int warmup_steps) -> (Tensor, Tensor, Tensor)",
      power_released);
  library.def(
      "power_released_once(Tensor x, Tensor? mask, Tensor weight, Tensor bias, "
      "Tensor(a!) running_psi2, Tensor(b!) e, Tensor(c!) step, Tensor(d!) num_rejected, "
      "int groups, float eps, float alpha_fwd, float alpha_bwd, int warmup_steps) -> Tensor",
      power_released_once);
}

}  // namespace
}  // namespace normexp
